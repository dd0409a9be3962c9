"""What the client makes of answers that are not as ever, and that it knows all parameters that the service takes."""

import json
import time
from email.utils import formatdate

import grpc
import pytest

from twotower.core import PARAMETERS, Floor, Mode
from twotower.parameters import Choice
from twotower_client import (
    MODES,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    RateLimited,
    ServiceError,
    Unavailable,
    UnexpectedAnswer,
    http_errors,
)
from twotower_client import http_codec as http
from twotower_client.answers import Block, Usage
from twotower_client.asking import Ask, Params, ask_of
from twotower_client.grpc_codec import error_from
from twotower_client.server_sent_events import EventReader
from twotower_client.wire import messages as pb

# Of a parameter here, by its kind there.
TYPES = {
    "Integer": "int | None",
    "Number": "float | None",
    "Flag": "bool | None",
    "TokenIds": "Sequence[int] | None",
    "TokenBiases": "Mapping[int, float] | None",
    "Constraints": "Mapping[str, Any] | None",
}


def test_every_parameter_is_declared_here_too() -> None:
    """One that is new: add it to Params, and to NAMES where it has another name over HTTP."""
    assert list(Params.__annotations__) == list(PARAMETERS)
    for name, parameter in PARAMETERS.items():
        assert http.NAMES.get(name, name) == parameter.http
        wanted = (
            f"{name.title()} | None" if isinstance(parameter.kind, Choice) else TYPES[type(parameter.kind).__name__]
        )
        told = str(Params.__annotations__[name]).replace("collections.abc.", "").replace("typing.", "")
        literal = {"mode": tuple(Mode), "floor": tuple(Floor)}.get(name)
        assert told == wanted if literal is None else all(f"'{word}'" in told for word in literal), name
    assert tuple(Mode) == MODES and set(http.NAMES) <= set(PARAMETERS)
    assert {field.name for field in pb.DecodingParams.DESCRIPTOR.fields} == set(PARAMETERS)


def test_events_in_pieces_of_any_size() -> None:
    text = "a\u2028b\x85 c"
    chunk = {
        "choices": [{"index": 0, "text": text, "token_ids": [1], "finish_reason": None, "seed": 1, "logprobs": None}]
    }
    usage = dict.fromkeys(Usage.__dataclass_fields__, 1)
    whole = b": a comment\r\n\r\ndata: " + json.dumps({**chunk, "usage": usage}, ensure_ascii=False).encode()
    whole += b"\r\n\r\nid: 5\ndata: [DONE]\n\n"
    for size in (1, 7, len(whole)):
        reader, events = http.StreamReader(Ask("Hi", "r")), []
        for at in range(0, len(whole), size):
            events += reader.push(whole[at : at + size])
        [block] = events
        assert isinstance(block, Block) and block.text == text and reader.ended


def test_a_stream_that_is_none_of_ours() -> None:
    for data in (b"data: nothing\n\n", b'data: {"choices": []}\n\n', b"data: []\n\n", b"data: 5\n\n"):
        with pytest.raises(UnexpectedAnswer, match="not from this service"):
            http.StreamReader(Ask("Hi", "r")).push(data)
    reader = EventReader()
    reader.LARGEST = 10
    assert reader.push(b"x" * 10) == []
    with pytest.raises(ValueError, match="more than 10 bytes"):
        reader.push(b"x")


def test_an_error_is_an_event_too() -> None:
    body = {"error": {"message": "gone", "type": "unavailable_error", "param": None, "code": None}}
    with pytest.raises(Unavailable, match="gone"):
        http.StreamReader(Ask("Hi", "r")).push(b"data: " + json.dumps(body).encode() + b"\n\n")


@pytest.mark.parametrize("data", [b"", b"<html>", b"[]", b'{"choices": []}', b"\xff"])
def test_a_whole_answer_that_is_none_of_ours(data: bytes) -> None:
    with pytest.raises(UnexpectedAnswer) as caught:
        http.answer_in(http.completion_call(Ask("Hi", "r-1")), data)
    assert caught.value.request_id == "r-1"


@pytest.mark.parametrize(
    ("status", "kind", "raised"),
    [
        (400, "invalid_request_error", InvalidRequest),
        (408, "invalid_request_error", InvalidRequest),
        (413, "", InvalidRequest),
        (429, "rate_limit_error", RateLimited),
        (429, "overloaded_error", Overloaded),
        (500, "internal_error", InternalError),
        (502, "", Unavailable),
        (503, "", Unavailable),
        (504, "", DeadlineExceeded),
        (302, "", UnexpectedAnswer),
    ],
)
def test_statuses_of_ours_and_of_gateways(status: int, kind: str, raised: type[ServiceError]) -> None:
    body = json.dumps({"error": {"message": "m", "type": kind, "param": "top_p"}}).encode() if kind else b"<html>no"
    error = http_errors.error_from(status, {}, body, "r")
    assert type(error) is raised and error.status == status and str(error) == ("m" if kind else "<html>no")
    assert [violation.field for violation in error.violations] == (["top_p"] if kind else [])


def test_when_to_come_again() -> None:
    def hint(told: str) -> float | None:
        return http_errors.error_from(503, {"retry-after": told}, b"", "").retry_after_s

    assert (hint("7"), hint("-1"), hint("soon")) == (7.0, 0.0, None)
    later = hint(formatdate(time.time() + 30, usegmt=True))
    assert later is not None and 20 < later <= 31


def test_a_message_above_grpcs_limit_never_has_room() -> None:
    error = error_from(grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max", (), "r")
    assert type(error) is Overloaded and not error.can_retry
    gone = error_from(grpc.StatusCode.UNAVAILABLE, "", (("x-twotower-id", "req-1"),), "r")
    assert gone.can_retry and gone.service_id == "req-1" and str(gone) == "UNAVAILABLE"


def test_a_label_is_drawn_once_and_numbers_must_be_numbers() -> None:
    first, second = (ask_of("Hi", {})[0].request_id for _ in range(2))
    assert first != second and len(first) <= 128
    with pytest.raises(InvalidRequest, match="JSON"):
        http.completion_call(Ask("Hi", "r", {"temperature": float("nan")}))
