"""Two ends in one loop: who comes in, what crosses, and every way to end."""

import asyncio
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from twotower.errors import ConfigError, TwoTowerError, Unavailable
from twotower.transport.codec import Codec, listed
from twotower.transport.connection import Connection, Listener, TooLarge, connect, listen
from twotower.transport.frames import framed
from twotower.transport.handshake import VERSION, About, Hello, new_token, said


@dataclass(frozen=True)
class Word:
    text: str
    number: int = 0


@dataclass(frozen=True)
class Sign:
    number: int


Said = Word | Sign
CODEC: Codec[Said] = Codec(Word, Sign)


@dataclass
class End:
    """Keeps what it is told."""

    beats: Callable[[], Sequence[Said]] = tuple
    heard: list[Said] = field(default_factory=list)
    lost_for: list[str] = field(default_factory=list)
    connection: "Connection[Said] | None" = None
    about: About = field(default_factory=dict)

    def take(self, message: Said) -> None:
        if message == Word("bad"):
            raise TwoTowerError("said a bad word")
        self.heard.append(message)

    def beat(self) -> Sequence[Said]:
        return self.beats()

    def lost(self, reason: str) -> None:
        self.lost_for.append(reason)


@asynccontextmanager
async def ends(
    silence_s: float = 3.0, tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None
) -> AsyncIterator[tuple[End, End, Listener]]:
    """Who listens, who has connected, and where."""
    mine, other = End(), End()

    def accept(connection: Connection[Said], about: About) -> tuple[End, About]:
        if about.get("role") != "cell":
            raise ConfigError(f"role: got {about.get('role')!r}, wanted 'cell'")
        mine.connection, mine.about = connection, about
        return mine, {"served": "yes"}

    async with asyncio.timeout(10):
        listener = await listen("127.0.0.1", CODEC, accept, silence_s=silence_s, tls=tls[0] if tls else None)
        other.connection, other.about = await connect(
            listener.address, {"role": "cell"}, CODEC, other, silence_s=silence_s, tls=tls[1] if tls else None
        )
        yield mine, other, listener
        for end in (mine, other):
            if end.connection is not None:
                end.connection.close()
        listener.close()


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def test_ends_tell_about_themselves_and_messages_cross_in_order() -> None:
    async with ends() as (mine, other, _):
        assert mine.about == {"role": "cell"} and other.about == {"served": "yes"}
        assert mine.connection and other.connection
        for number in range(300):
            mine.connection.post(Word("a", number))
            other.connection.post(Word("b", number))
            if number % 7 == 0:
                await asyncio.sleep(0)
        await until(lambda: len(mine.heard) == len(other.heard) == 300)
        assert other.heard == [Word("a", number) for number in range(300)]
        assert mine.heard == [Word("b", number) for number in range(300)]


async def test_what_is_posted_in_one_turn_leaves_as_one_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ends() as (mine, other, _):
        assert mine.connection
        await asyncio.sleep(0.01)  # the first beats
        frames: list[bytes] = []
        monkeypatch.setattr("twotower.transport.connection.framed", lambda body: frames.append(body) or framed(body))
        for number in range(5):
            mine.connection.post(Sign(number))
        await until(lambda: len(other.heard) == 5)
        assert len(frames) == 1


async def test_what_a_beat_says_crosses_at_once() -> None:
    async with ends() as (_, other, listener):
        third = End(beats=lambda: [Sign(1)])
        connection, _ = await connect(listener.address, {"role": "cell"}, CODEC, third, silence_s=3.0)
        await asyncio.sleep(0.01)
        assert other.heard == []
        connection.close()


async def test_closing_sends_what_was_posted_first() -> None:
    async with ends() as (mine, other, _):
        assert mine.connection and other.connection
        mine.connection.post(Word("last", 1))
        mine.connection.close()
        await until(lambda: other.lost_for)
        assert other.heard == [Word("last", 1)]
        assert other.lost_for == ["is gone"] and mine.lost_for == ["was disconnected"]
        for end in (mine, other):
            assert end.connection
            with pytest.raises(Unavailable, match="the other end"):
                end.connection.post(Sign(1))
            with pytest.raises(Unavailable, match="the other end"):
                await end.connection.room()


@pytest.mark.slow
async def test_a_silent_end_is_given_up_and_a_speaking_one_is_not() -> None:
    async with ends(silence_s=0.3) as (mine, other, _):
        await asyncio.sleep(0.6)
        assert not mine.lost_for and not other.lost_for, "beats alone keep it"
        assert other.connection and other.connection._timer
        other.connection._timer.cancel()  # as an end that hangs
        await until(lambda: mine.lost_for)
        assert mine.lost_for == ["has been silent for 0.3 s"]
        await until(lambda: other.lost_for)


async def test_who_was_held_up_himself_hangs_up_on_nobody() -> None:
    async with ends(silence_s=0.06) as (mine, other, _):
        for _ in range(5):
            time.sleep(0.1)  # both ends stand still, much longer than the silence
            await asyncio.sleep(0.001)
        assert not mine.lost_for and not other.lost_for


@pytest.mark.parametrize("which", ["bad word", "frame", "length"])
async def test_nonsense_ends_a_connection(which: str) -> None:
    async with ends() as (mine, other, _):
        assert other.connection
        if which == "bad word":
            other.connection.post(Word("bad"))
        else:
            frame = framed(b"nonsense") if which == "frame" else b"\xff" * 8
            other.connection._transport.write(frame)
        await until(lambda: mine.lost_for)
        says = {
            "bad word": "said a bad word",
            "frame": "sent an unknown message",
            "length": "got a frame of 4294967295",
        }
        assert says[which] in mine.lost_for[0]
        await until(lambda: other.lost_for)


async def test_an_end_that_does_not_read() -> None:
    async with ends() as (mine, other, _):
        assert mine.connection and other.connection
        other.connection._transport.pause_reading()
        large = Word("x" * (1 << 20))
        for _ in range(16):
            mine.connection.post(large)
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await mine.connection.room()
        waiting = asyncio.create_task(mine.connection.room())
        other.connection._transport.resume_reading()
        await waiting
        await until(lambda: len(other.heard) == 16)
        other.connection._transport.pause_reading()
        with pytest.raises(Unavailable, match="does not read"):
            for _ in range(100):  # posters that cannot wait
                mine.connection.post(large)
                await asyncio.sleep(0)
        assert mine.lost_for == ["does not read what it is sent"]


async def test_a_message_has_a_bound() -> None:
    async with ends() as (mine, other, _):
        assert mine.connection
        with pytest.raises(TooLarge, match="wanted at most 33554432"):
            mine.connection.post(Word("x" * (33 << 20)))
        for _ in range(3):
            mine.connection.post(Word("x" * (20 << 20)))  # more than a frame in one turn
        await until(lambda: len(other.heard) == 3)


@pytest.mark.parametrize(
    ("greeting", "answer"),
    [
        (None, b"role: got 'x', wanted 'cell'"),
        (Hello(VERSION + 1, "", {}), b"version: got 2, wanted 1"),
        (b"\x00\x00\x00\x08nonsense", b"no message of ours"),
        (b"\x00\x00\x20\x00", b""),  # more than anybody says before the handshake
    ],
)
async def test_strangers_are_let_in_by_nobody(greeting: Hello | bytes | None, answer: bytes) -> None:
    async with ends() as (mine, other, listener):
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.address.port)
        if isinstance(greeting, Hello):
            greeting = said(replace(greeting, token=listener.address.token))
        writer.write(greeting or said(Hello(VERSION, listener.address.token, {"role": "x"})))
        writer.write(framed(listed([CODEC.encode(Sign(9))])))
        with suppress(ConnectionResetError):
            assert answer in await reader.read()
        writer.close()
        assert mine.heard == [] and mine.lost_for == [] and other.lost_for == []


class Unread(Codec[Said]):
    """Whose messages nobody may read."""

    def decode(self, messages: bytes | memoryview) -> list[Said]:
        raise AssertionError(f"read {bytes(messages)!r} of somebody without the token")


def nobody_comes_in(connection: Connection[Said], about: About) -> tuple[End, About]:
    raise AssertionError(f"let in {about}")


_MESSAGE = framed(listed([CODEC.encode(Sign(9))]))


@pytest.mark.parametrize(
    "first",
    [
        said(Hello(VERSION, "", {"role": "cell"})),
        said(Hello(VERSION, new_token()[:63] + "é", {"role": "cell"})),
        said(Hello(VERSION + 1, "wrong", {})),
        said(Hello(VERSION, "x" * 3000, {})),
        _MESSAGE,
        framed(b""),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["no token", "a wrong one", "another version", "a long one", "a message", "a beat", "HTTP", "TLS"],
)
async def test_without_the_token_nothing_is_read_and_nobody_is_let_in(first: bytes) -> None:
    """Nor told anything but that it is refused."""
    listener = await listen("127.0.0.1", Unread(Word, Sign), nobody_comes_in, silence_s=3.0)
    try:
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.address.port)
            writer.write(first + 3 * _MESSAGE)
            answer = b""
            with suppress(ConnectionResetError):
                answer = await reader.read()
            writer.close()
        assert listener.address.token.encode() not in answer
        assert not answer or b"Refused" in answer
    finally:
        listener.close()


async def test_those_who_say_nothing_make_room_for_those_who_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.transport.connection._MOST_UNKNOWN", 3)
    monkeypatch.setattr("twotower.transport.connection.GREETING_S", 60.0)
    async with ends() as (mine, _, listener):
        silent = [await asyncio.open_connection("127.0.0.1", listener.address.port) for _ in range(3)]
        known = End()
        known.connection, _ = await connect(listener.address, {"role": "cell"}, CODEC, known, silence_s=3.0)
        with suppress(ConnectionResetError):
            assert await silent[0][0].read() == b"", "the oldest had to go"
        assert mine.connection
        mine.connection.post(Sign(1))
        await until(lambda: known.heard)
        for _, writer in silent:
            writer.close()
        known.connection.close()
        again = End()
        again.connection, _ = await connect(listener.address, {"role": "cell"}, CODEC, again, silence_s=3.0)
        again.connection.close()


async def test_a_refusal_and_a_wrong_token_and_nobody() -> None:
    async with ends() as (_, _, listener):
        address = listener.address
        for at, about, says in (
            (address, {"role": "x"}, "refused: role: got 'x', wanted 'cell'"),
            (replace(address, token=new_token()), {"role": "cell"}, "refused: the token is wrong"),
        ):
            with pytest.raises(Unavailable, match=says):
                await connect(at, about, CODEC, End(), silence_s=3.0)
        listener.close()
        with pytest.raises(Unavailable, match="cannot be reached"):
            await connect(address, {"role": "cell"}, CODEC, End(), silence_s=3.0)
    assert address.token not in repr(address)


async def test_who_never_answers() -> None:
    hung_up = asyncio.Event()

    async def listens_only(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        hung_up.set()

    silent = await asyncio.start_server(listens_only, "127.0.0.1", 0)
    async with ends() as (_, _, listener):
        address = replace(listener.address, port=silent.sockets[0].getsockname()[1])
        with pytest.raises(Unavailable, match=r"has not answered within 0\.05 s"):
            await connect(address, {}, CODEC, End(), silence_s=3.0, timeout_s=0.05)
    await hung_up.wait()
    silent.close()


async def test_over_tls(tmp_path: Path) -> None:
    certificate, key = str(tmp_path / "certificate.pem"), str(tmp_path / "key.pem")
    openssl = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run([*openssl.split(), *files], check=True, capture_output=True)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate, key)
    async with ends(tls=(server, ssl.create_default_context(cafile=certificate))) as (mine, other, listener):
        assert mine.connection
        mine.connection.post(Word("private"))
        await until(lambda: other.heard)
        with pytest.raises(Unavailable):
            await connect(
                listener.address,
                {"role": "cell"},
                CODEC,
                End(),
                silence_s=3.0,
                timeout_s=1.0,
                tls=ssl.create_default_context(),
            )
