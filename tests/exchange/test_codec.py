"""Every control message survives its bytes; anything else is refused."""

import json

import pytest

from twotower.errors import Cancelled, FieldError, InvalidRequest, LinkDown, TwoTowerError
from twotower.exchange.codec import (
    Heartbeat,
    Hello,
    Message,
    Payload,
    Refused,
    Taken,
    Welcome,
    decode,
    encode,
)
from twotower.exchange.protocol import Attach, Commit, Delta, Failed, Prefill, Release, Released
from twotower.wire import CodecError

MESSAGES: list[Message] = [
    Hello(1, 2, 3, "float32[2, 1]", "cpu"),
    Welcome("gloo"),
    Refused("epoch: got 2, wanted 3"),
    Heartbeat(12345678901234),
    Payload(7, 4096, (Delta(1, 0, 16, 3, False), Delta(2, 5, 5, 0, True, (4, 5)))),
    Taken(),
    Prefill(1, (4, 5, 6), 40),
    Commit(1, 3, ()),
    Attach(9, (1, 2), 64),
    Release(1),
    Released(1),
]


def test_messages_survive_in_order() -> None:
    assert decode(encode(17, MESSAGES)) == (17, MESSAGES)


@pytest.mark.parametrize(
    "error",
    [
        LinkDown("gone"),
        Cancelled(""),
        InvalidRequest([FieldError("start", "got 3"), FieldError("t", "got ✗")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive(error: TwoTowerError) -> None:
    _, (message,) = decode(encode(0, [Failed(4, error)]))
    assert isinstance(message, Failed)
    assert (type(message.error), str(message.error)) == (type(error), str(error))


def test_an_error_of_no_public_kind_crosses_as_its_nearest_public_ancestor() -> None:
    _, (message,) = decode(encode(0, [Failed(4, CodecError("odd"))]))
    assert isinstance(message, Failed)
    assert (type(message.error), str(message.error)) == (TwoTowerError, "odd")


@pytest.mark.parametrize(
    "envelope",
    [
        {},
        [],
        [True, []],
        ["0", []],
        [0, [], 0],
        [0, [["Release", {}]]],
        [0, [["Release", {"sequence": 1, "slot": 2}]]],
        [0, [["Release", {"sequence": "1"}]]],
        [0, [["Release", {"sequence": True}]]],
        [0, [["Release", {"sequence": 1.0}]]],
        [0, [["release", {"sequence": 1}]]],
        [0, [["Delta", {"sequence": 1}]]],
        [0, [["Commit", {"sequence": 1, "start": 0, "token_ids": "45"}]]],
        [0, [["Commit", {"sequence": 1, "start": 0, "token_ids": [4, None]}]]],
        [0, [["Payload", {"number": 1, "nbytes": 16, "deltas": [{"sequence": 1}]}]]],
        [0, [["Failed", {"sequence": 1, "error": {"type": "SystemExit", "message": "x"}}]]],
        [0, [["Failed", {"sequence": 1, "error": {"type": "LinkDown"}}]]],
        [0, [["Failed", {"sequence": 1, "error": {"type": "InvalidRequest", "problems": [["a"]]}}]]],
        [0, [["Failed", {"sequence": 1, "error": "broken"}]]],
    ],
    ids=str,
)
def test_what_is_no_message_of_ours_is_refused(envelope: object) -> None:
    with pytest.raises(CodecError):
        decode(json.dumps(envelope).encode())


@pytest.mark.parametrize("frame", [b"", b"[0,", b"\xff\xfe", b"\x80\x04K\x01."], ids=repr)
def test_bytes_that_are_no_json_are_refused(frame: bytes) -> None:
    with pytest.raises(CodecError):
        decode(frame)
