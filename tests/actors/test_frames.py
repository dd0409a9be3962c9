"""Messages that are too many for one frame take several; one that is too large fails alone, and the line goes on."""

from typing import Any

import pytest

from actors import frames
from actors.frames import framed_all, take_frames
from actors.line import NEWS, ORDERS, Ended, TowerLine
from actors.remote import RemoteEngine
from twotower.core import BlockEvent, FailureEvent, FinishReason, ReleasedEvent, Request, RequestId
from twotower.errors import InvalidRequest, TwoTowerError

LARGE = tuple(range(300))


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_MAX_BYTES", 1000)


def _join(parts: list[bytes]) -> bytes:
    return b",".join(parts)


def test_as_many_frames_as_it_takes() -> None:
    parts = [bytes([65 + number]) * 300 for number in range(7)]
    data, too_large = framed_all([*parts, b"x" * 1001], _join)
    bodies = list(take_frames(bytearray(data)))
    assert b",".join(bodies) == b",".join(parts) and all(len(body) <= 1000 for body in bodies)
    assert too_large == [b"x" * 1001]


class _Writer:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.data = bytearray()

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.data += data


class _Reader:
    """Says nothing but that it lives."""

    async def readexactly(self, count: int) -> bytes:
        return (2).to_bytes(4, "big") if count == 4 else b"[]"


async def test_a_request_that_is_too_large_fails_alone() -> None:
    engine, writer = RemoteEngine(None, "context", 1.0), _Writer()
    line: Any = engine
    line._writer, line._reader = writer, _Reader()
    engine.add([Request(RequestId("a"), (5,)), Request(RequestId("b"), LARGE), Request(RequestId("c"), (5,))])
    sent = [order for body in take_frames(writer.data) for order in ORDERS.decode(body)]
    assert [order.request.id for order in sent] == ["a", "c"]  # type: ignore[union-attr]
    failure, released = await engine.events()
    assert isinstance(failure, FailureEvent) and isinstance(failure.error, InvalidRequest)
    assert failure.request_id == "b" and released == ReleasedEvent(RequestId("b"))
    assert await engine.events() == []


class _Socket:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.data = bytearray()

    def sendall(self, data: bytes) -> None:
        self.data += data


def test_an_answer_that_is_too_large_fails_alone() -> None:
    line: Any = TowerLine(None, 1.0)  # type: ignore[arg-type]
    line._socket = sock = _Socket()
    small = BlockEvent(RequestId("a"), 0, (5,), 1, 1)
    line._send([small, BlockEvent(RequestId("b"), 0, LARGE, 1, 1, FinishReason.LENGTH), ReleasedEvent(RequestId("b"))])
    first, second, third = (news for body in take_frames(sock.data) for news in NEWS.decode(body))
    assert first == small and third == ReleasedEvent(RequestId("b"))
    assert isinstance(second, FailureEvent) and type(second.error) is TwoTowerError
    assert not isinstance(second, Ended)
