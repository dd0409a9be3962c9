"""Messages as bytes: what goes in comes out, to the last bit, and nothing else is taken."""

from typing import Any

import pytest

from twotower.core import (
    BlockEvent,
    DecodingParams,
    FailureEvent,
    FinishReason,
    Mode,
    Request,
    RequestId,
    RoundEvent,
    ScoreEvent,
    StepEvent,
)
from twotower.errors import (
    CheckpointError,
    FieldError,
    InvalidRequest,
    LinkDown,
    Overloaded,
    TwoTowerError,
    Unavailable,
)
from twotower.transport.codec import Codec, CodecError, listed

CODEC: Codec[Any] = Codec(Request, BlockEvent, ScoreEvent, StepEvent, RoundEvent, FailureEvent)
PARAMS = DecodingParams(mode=Mode.AR, temperature=0.1, seed=2**64 - 1, stop_token_ids=(7, 8), ignore_eos=True)
ID = RequestId("ü")


class Private(Unavailable):
    """Not in the public tree of errors."""


@pytest.mark.parametrize(
    "message",
    [
        Request(ID, (4, 5, 6), PARAMS, -3, (1, 2)),
        Request(ID, (), trace=True),
        BlockEvent(ID, 3, (), 0, 0, FinishReason.STOP, 1e-45),
        BlockEvent(ID, 0, tuple(range(100_000)), 5, 1),
        ScoreEvent(ID, (-0.0, -12.34567928314209, -1e-45), (True, False, True), 0.5),
        StepEvent(ID, 16, 15, 3, (16, 30), (5, 6), (0.1 + 0.2, 1.0)),
        RoundEvent(ID, 1, (5, 6), 1, 7),
    ],
)
def test_what_is_sent_arrives(message: object) -> None:
    assert CODEC.decode(listed([CODEC.encode(message)])) == [message]
    assert CODEC.decode(listed([CODEC.encode(message)] * 3)) == [message] * 3


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [
        (TwoTowerError("a"), TwoTowerError("a")),
        (CheckpointError("x: y"), CheckpointError("x: y")),
        (LinkDown("gone"), LinkDown("gone")),
        (Private("private"), Unavailable("private")),
        (Overloaded("full", 2.5), Overloaded("full", 2.5)),
        (Overloaded("full"), Overloaded("full")),
        (InvalidRequest([FieldError("a", "b"), FieldError("c", "d")]),) * 2,
    ],
)
def test_errors_keep_what_they_say(sent: TwoTowerError, arrives: TwoTowerError) -> None:
    [event] = CODEC.decode(listed([CODEC.encode(FailureEvent(ID, sent))]))
    assert type(event.error) is type(arrives) and str(event.error) == str(arrives)
    assert getattr(event.error, "retry_after_s", None) == getattr(arrives, "retry_after_s", None)
    assert getattr(event.error, "problems", None) == getattr(arrives, "problems", None)


def _fields(**fields: object) -> bytes:
    import msgspec

    return msgspec.msgpack.encode([["FailureEvent", {"request_id": "a", **fields}]])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "0 bytes"),
        (b"nonsense", "array"),
        (b"\x80", "array"),
        (b"\x91" * 100_000, "100000 bytes"),
        (b"\x91\x92\xa1x\x80", "got a message 'x', wanted one of"),
        (b"\x91\x92\xaaBlockEvent\x80", "required field"),
        (listed([CODEC.encode(Request(ID, (4,)))])[:-2], "truncated"),
        (listed([CODEC.encode(Request(ID, (4,)))]) + b"\x00", "trailing"),
        (CODEC.encode(Request(ID, (4,))), "array"),
        (_fields(error={"type": "SystemExit", "message": "a"}), "an error of ours"),
        (_fields(error={"type": "InvalidRequest", "problems": [["a"]]}), "what is wrong with it"),
        (_fields(error=7), "an error of ours"),
    ],
)
def test_nonsense_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(CodecError, match=says):
        CODEC.decode(body)


def test_wrong_types_are_refused() -> None:
    for message in (Request(ID, (True,)), Request(ID, ("4",)), Request(7, (4,))):  # type: ignore[arg-type]
        with pytest.raises(CodecError, match="Expected"):
            CODEC.decode(listed([CODEC.encode(message)]))
