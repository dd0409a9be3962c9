"""A deadline is for the whole of an HTTP call, however often its bytes come: with a clock that is made up."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpcore2
import httpx2
import pytest

from twotower_client import Block, Client, DeadlineExceeded, RetryPolicy, Unavailable, deadlines
from twotower_client.asking import Ask
from twotower_client.http_face import AsyncHttpFace, HttpFace
from twotower_client.target import target_of

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
CHUNK = (
    b'data: {"choices":[{"index":0,"text":"a","token_ids":[1],"finish_reason":null,"seed":1,"logprobs":null}],"usage":'
    b'{"prompt_tokens":1,"completion_tokens":1,"num_steps":0,"num_blocks":1,"num_drafted":0,"num_accepted":0,'
    b'"num_ar_blocks":0,"num_diffusion_blocks":0}}\n\n'
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(deadlines, "clock", clock)
    return clock


class SlowStream(httpcore2.NetworkStream):
    """Each read takes three seconds of the clock, and no time. `waits`: how long each could have taken."""

    def __init__(self, clock: Clock, parts: Iterator[bytes], waits: list[float | None]) -> None:
        self._clock, self._parts, self._waits = clock, parts, waits

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._waits.append(timeout)
        if timeout is not None and timeout < 3:
            self._clock.now += timeout
            raise httpcore2.ReadTimeout("slow")
        self._clock.now += 3
        return next(self._parts)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._waits.append(timeout)

    def close(self) -> None:
        pass

    def start_tls(self, ssl_context: Any, server_hostname: Any = None, timeout: float | None = None) -> "SlowStream":
        self._waits.append(timeout)
        return self

    def get_extra_info(self, info: str) -> Any:
        return None


class SlowBackend(httpcore2.NetworkBackend):
    def __init__(self, clock: Clock, parts: list[bytes]) -> None:
        self._clock, self._parts, self.waits = clock, parts, list[float | None]()
        self.asked = list[str]()

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *_: Any) -> httpcore2.NetworkStream:
        self.waits.append(timeout)
        self.asked.append(f"{host}:{port}")
        return SlowStream(self._clock, iter(self._parts), self.waits)


def face_of(backend: SlowBackend, url: str = "http://host", proxy: str | None = None) -> HttpFace:
    through = None if proxy is None else httpx2.Proxy(proxy)
    return HttpFace(target_of(url), deadlines.Transport(None, 1, deadlines.Backend(backend), through))


def test_each_wait_of_a_stream_gets_what_is_left(clock: Clock) -> None:
    backend = SlowBackend(clock, [HEAD, CHUNK, *[b": x\n\n"] * 9])
    events = []
    with pytest.raises(DeadlineExceeded):
        for event in face_of(backend).stream(Ask("Hi", "r"), 10.0):
            events.append(event)
    assert [type(event) for event in events] == [Block] and clock.now == 110.0
    assert [wait for wait in backend.waits if wait is not None and wait < 10] == [7.0, 4.0, 1.0]


def test_through_a_proxy_too(clock: Clock) -> None:
    backend = SlowBackend(clock, [HEAD, CHUNK, *[b": x\n\n"] * 9])
    with pytest.raises(DeadlineExceeded):
        list(face_of(backend, proxy="http://me:secret@proxy:3128").stream(Ask("Hi", "r"), 10.0))
    assert backend.asked == ["proxy:3128"] and clock.now == 110.0


def test_and_through_a_tunnel(clock: Clock) -> None:
    """Its head, TLS and the answer have one deadline together."""
    backend = SlowBackend(clock, [b"HTTP/1.1 200 OK\r\n\r\n", HEAD, CHUNK, *[b": x\n\n"] * 9])
    with pytest.raises(DeadlineExceeded):
        list(face_of(backend, "https://host", "http://proxy:3128").stream(Ask("Hi", "r"), 10.0))
    assert backend.asked == ["proxy:3128"] and clock.now == 110.0


def test_a_proxy_that_refuses(clock: Clock) -> None:
    backend = SlowBackend(clock, [b"HTTP/1.1 407 Who\r\ncontent-length: 0\r\n\r\n"])
    with pytest.raises(Unavailable, match="407"):
        list(face_of(backend, "https://host", "http://proxy:3128").stream(Ask("Hi", "r"), 10.0))


def test_each_wait_of_a_whole_answer_too(clock: Clock) -> None:
    """Its head comes byte by byte, so no single wait is long."""
    backend = SlowBackend(clock, [bytes([byte]) for byte in HEAD])
    with pytest.raises(DeadlineExceeded):
        face_of(backend).complete(Ask("Hi", "r"), 10.0)
    assert clock.now == 110.0


def test_time_that_the_caller_takes_counts_too(clock: Clock) -> None:
    backend = SlowBackend(clock, [HEAD, CHUNK, CHUNK, CHUNK])
    events = face_of(backend).stream(Ask("Hi", "r"), 60.0)
    next(events)
    assert deadlines.left_s(None) is None, "the caller's own connections have no deadline"
    clock.now += 60
    with pytest.raises(DeadlineExceeded):
        next(events)


def test_without_a_deadline_there_is_none(clock: Clock) -> None:
    backend = SlowBackend(clock, [HEAD, CHUNK])
    next(face_of(backend).stream(Ask("Hi", "r"), None))
    assert set(backend.waits) == {10.0, None}, "only a connection is waited for so long"


def test_a_server_that_never_stops_talking() -> None:
    """The real connection: it is cut off, though each read comes at once."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def talk() -> None:
            peer, _ = server.accept()
            with peer:
                try:
                    peer.sendall(HEAD)
                    while True:
                        peer.sendall(b": x\n\n")
                except OSError:
                    pass

        talking = threading.Thread(target=talk)
        talking.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with Client(url, retry=RetryPolicy(attempts=1)) as client, pytest.raises(DeadlineExceeded):
            client.stream("Hi", timeout_s=0.2).rest()
        talking.join(20)
        assert not talking.is_alive()


class Trickle(httpx2.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield CHUNK
        await asyncio.Event().wait()


async def test_asyncio_keeps_it_too() -> None:
    async def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, stream=Trickle())

    face = AsyncHttpFace(target_of("http://host"), httpx2.MockTransport(answer))
    events = face.stream(Ask("Hi", "r"), 0.05)
    assert isinstance(await anext(events), Block)
    with pytest.raises(DeadlineExceeded):
        await anext(events)
    with pytest.raises(DeadlineExceeded):
        await face.complete(Ask("Hi", "r"), 0.05)
