"""Every control message survives its bytes; anything else is refused."""

import json
from typing import Any

import pytest

from twotower.errors import Cancelled, FieldError, InvalidRequest, LinkDown, TwoTowerError
from twotower.exchange.messages import CODEC, Heartbeat, Message, Payload, Taken
from twotower.exchange.protocol import Commit, Delta, Failed, Prefill, Release, Released
from twotower.transport.codec import CodecError, listed

MESSAGES: list[Message] = [
    Heartbeat(12345678901234),
    Payload(7, 4096, (Delta(1, 0, 16, 3, False), Delta(2, 5, 5, 0))),
    Taken(),
    Prefill(1, (4, 5, 6), 40),
    Commit(1, 3, ()),
    Release(1),
    Released(1),
]


def _crossed(*messages: Message) -> list[Any]:
    return CODEC.decode(listed([CODEC.encode(message) for message in messages]))


def test_messages_survive_in_order() -> None:
    assert _crossed(*MESSAGES) == MESSAGES


@pytest.mark.parametrize(
    "error",
    [LinkDown("gone"), Cancelled(""), InvalidRequest([FieldError("start", "got 3"), FieldError("t", "got ✗")])],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive(error: TwoTowerError) -> None:
    (message,) = _crossed(Failed(4, error))
    assert (type(message.error), str(message.error)) == (type(error), str(error))


def test_an_error_of_no_public_kind_crosses_as_its_nearest_public_ancestor() -> None:
    (message,) = _crossed(Failed(4, CodecError("odd")))
    assert (type(message.error), str(message.error)) == (TwoTowerError, "odd")


@pytest.mark.parametrize(
    "message",
    [
        ["Release", {}],
        ["Release", {"sequence": "1"}],
        ["Release", {"sequence": True}],
        ["Release", {"sequence": 1.5}],
        ["release", {"sequence": 1}],
        ["Delta", {"sequence": 1}],
        ["Commit", {"sequence": 1, "start": 0, "token_ids": "45"}],
        ["Commit", {"sequence": 1, "start": 0, "token_ids": [4, None]}],
        ["Payload", {"number": 1, "nbytes": 16, "deltas": [{"sequence": 1}]}],
        ["Failed", {"sequence": 1, "error": {"type": "SystemExit", "message": "x"}}],
        ["Failed", {"sequence": 1, "error": {"type": "LinkDown"}}],
        ["Failed", {"sequence": 1, "error": {"type": "InvalidRequest", "problems": [["a"]]}}],
        ["Failed", {"sequence": 1, "error": "broken"}],
    ],
    ids=json.dumps,
)
def test_what_is_no_message_of_ours_is_refused(message: object) -> None:
    import msgspec

    with pytest.raises(CodecError):
        CODEC.decode(listed([msgspec.msgpack.encode(message)]))
