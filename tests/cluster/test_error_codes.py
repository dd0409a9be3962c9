"""Every error of ours has a row, and only what is meant for clients reaches them."""

import logging
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from cluster.faces.error_codes import (
    CODES,
    INTERNAL,
    Failure,
    LongHead,
    NoSuchModel,
    SlowBody,
    UnknownEncoding,
    code_of,
    describe,
)
from cluster.faces.grpc.boundary import status_of
from cluster.faces.http.service import error_response
from cluster.runs.allowances import LimitReached
from cluster.runs.callers import KeyRefused
from twotower import errors
from twotower.errors import (
    Cancelled,
    CheckpointError,
    ConfigError,
    DeadlineExceeded,
    FieldError,
    InvalidRequest,
    LinkDown,
    NumericalError,
    Overloaded,
    TwoTowerError,
    Unavailable,
)

OURS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TwoTowerError)]


@pytest.mark.parametrize("kind", [kind for kind in OURS if kind is not TwoTowerError])
def test_every_error_is_decided(kind: type[TwoTowerError]) -> None:
    assert any(base in CODES for base in kind.__mro__)


def test_the_table_says_what_it_should() -> None:
    rows = {kind.__name__: (code.http, code.grpc.name) for kind, code in CODES.items()}
    assert rows == {
        "InvalidRequest": (400, "INVALID_ARGUMENT"),
        "NoSuchModel": (404, "INVALID_ARGUMENT"),
        "SlowBody": (408, "INVALID_ARGUMENT"),
        "UnknownEncoding": (415, "INVALID_ARGUMENT"),
        "LongHead": (431, "INVALID_ARGUMENT"),
        "KeyRefused": (401, "UNAUTHENTICATED"),
        "LimitReached": (429, "RESOURCE_EXHAUSTED"),
        "Overloaded": (429, "RESOURCE_EXHAUSTED"),
        "Unavailable": (503, "UNAVAILABLE"),
        "DeadlineExceeded": (504, "DEADLINE_EXCEEDED"),
        "Cancelled": (499, "CANCELLED"),
        "NumericalError": (500, "ABORTED"),
        "CheckpointError": (500, "INTERNAL"),
        "ConfigError": (500, "INTERNAL"),
    }
    assert code_of(LinkDown("x")) is CODES[Unavailable]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (InvalidRequest, "INVALID_REQUEST"),
        (NoSuchModel, "MODEL_NOT_FOUND"),
        (KeyRefused, "INVALID_API_KEY"),
        (LimitReached, "RATE_LIMIT_EXCEEDED"),
        (Overloaded, "OVERLOADED"),
        (Unavailable, "UNAVAILABLE"),
        (DeadlineExceeded, "DEADLINE_EXCEEDED"),
        (Cancelled, "CANCELLED"),
        (NumericalError, "NUMERICAL"),
        (ConfigError, "INTERNAL"),
    ],
)
def test_over_grpc_each_has_a_reason_for_programs(kind: type[TwoTowerError], reason: str) -> None:
    [first, *_] = status_of(Failure(CODES[kind], "why")).details
    info = error_details_pb2.ErrorInfo()
    assert first.Unpack(info) and (info.reason, info.domain) == (reason, "twotower.v1")


RETRIES: dict[type[TwoTowerError], tuple[str | None, str | None]] = {
    InvalidRequest: (None, None),  # no SDK repeats 400, 404, 415 and 431 by itself
    NoSuchModel: (None, None),
    UnknownEncoding: (None, None),
    LongHead: (None, None),
    SlowBody: ("false", None),
    KeyRefused: ("false", None),
    Overloaded: ("true", "1"),
    LimitReached: ("true", "3"),
    Unavailable: ("true", "5"),
    LinkDown: ("true", "5"),
    DeadlineExceeded: ("false", None),
    Cancelled: (None, None),  # nobody is there to hear it
    NumericalError: ("false", None),
    CheckpointError: (None, None),  # nobody knows
    ConfigError: (None, None),
}
ARGUMENTS: dict[type[TwoTowerError], tuple[Any, ...]] = {
    LimitReached: ("a", "tokens_per_minute", "no more", 2.5),
    KeyRefused: ("not known", "unknown key"),
}


@pytest.mark.parametrize("kind", RETRIES)
def test_clients_are_told_whether_and_when_to_come_again(kind: type[TwoTowerError]) -> None:
    """OpenAI's SDKs repeat 408, 429 and all from 500 on, unless x-should-retry says otherwise."""
    should_retry, retry_after = RETRIES[kind]
    error = kind.of("x", "wrong") if issubclass(kind, InvalidRequest) else kind(*ARGUMENTS.get(kind, ("gone",)))
    failure = describe(error)
    headers = error_response(failure).headers
    assert (headers.get("x-should-retry"), headers.get("retry-after")) == (should_retry, retry_after)
    hints = [detail for detail in status_of(failure).details if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)]
    assert len(hints) == (retry_after is not None)


def test_every_row_says_whether_to_come_again() -> None:
    assert CODES.keys() <= RETRIES.keys()


@pytest.mark.parametrize(
    "error",
    [KeyError("secret"), CheckpointError("/secret"), ConfigError("secret"), TwoTowerError("secret")],
)
def test_internal_errors_tell_only_an_id(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        failure = describe(error, "r-1")
    assert failure.code is INTERNAL and failure.code.grpc is grpc.StatusCode.INTERNAL
    assert "secret" not in failure.message
    assert failure.message.split()[-1] in caplog.text and "secret" in caplog.text and "r-1" in caplog.text


def test_what_is_told_is_one_line_of_bounded_length() -> None:
    assert describe(Unavailable("gone\nTraceback \x1b[31m" + "x" * 5000)).message.startswith("gone Traceback [31mxxx")
    for error in (Unavailable("a\n" * 9000), InvalidRequest([FieldError("f\n" * 900, "m\u2028" * 900)] * 90)):
        failure = describe(error)
        texts = [failure.message, *(t for p in failure.problems for t in (p.field, p.message))]
        assert all(text.isprintable() and len(text) <= 1000 for text in texts) and len(failure.problems) <= 16


def test_a_request_error_keeps_its_fields() -> None:
    failure = describe(InvalidRequest.of("seed", "got -1"))
    assert failure.message == "seed: got -1" and failure.problems[0].field == "seed"
