"""The only table from our errors to HTTP statuses and gRPC codes, and the parts of an error that a client may see."""

import logging
import math
import secrets
from dataclasses import dataclass

import grpc

from cluster.runs.allowances import LimitReached
from cluster.runs.callers import KeyRefused
from twotower.errors import (
    Cancelled,
    CheckpointError,
    ConfigError,
    DeadlineExceeded,
    FieldError,
    InvalidRequest,
    NumericalError,
    Overloaded,
    TwoTowerError,
    Unavailable,
)
from twotower.showing import one_line

logger = logging.getLogger(__name__)

# gRPC carries an error in headers, which are small; HTTP and gRPC say the same.
_MAX_PROBLEMS, _MAX_MESSAGE = 16, 1000


class NoSuchModel(InvalidRequest):
    """The request names another model than the served one."""


class SlowBody(InvalidRequest):
    """The body of a request did not arrive in time."""


class LongHead(InvalidRequest):
    """The path and the headers of a request are too long."""


class UnknownEncoding(InvalidRequest):
    """The body has an unsupported compression."""


@dataclass(frozen=True, slots=True)
class Code:
    """The public form of one kind of error. `public`: its message was written for clients.

    `retry`: whether the same request may succeed later; None if unknown.
    """

    http: int
    grpc: grpc.StatusCode
    type: str
    retry: bool | None = None
    retry_after_s: int | None = None
    public: bool = True
    code: str | None = None

    @property
    def reason(self) -> str:
        """The kind in one word, as in google.rpc.ErrorInfo: OVERLOADED, RATE_LIMIT_EXCEEDED."""
        return (self.code or self.type.removesuffix("_error")).upper()


INTERNAL = Code(500, grpc.StatusCode.INTERNAL, "internal_error", public=False)
_WRONG = "invalid_request_error"

CODES: dict[type[TwoTowerError], Code] = {
    InvalidRequest: Code(400, grpc.StatusCode.INVALID_ARGUMENT, _WRONG),
    NoSuchModel: Code(404, grpc.StatusCode.INVALID_ARGUMENT, _WRONG, code="model_not_found"),
    # The same body over the same line would take as long again, and hold a place for as long.
    SlowBody: Code(408, grpc.StatusCode.INVALID_ARGUMENT, _WRONG, retry=False),
    UnknownEncoding: Code(415, grpc.StatusCode.INVALID_ARGUMENT, _WRONG),
    LongHead: Code(431, grpc.StatusCode.INVALID_ARGUMENT, _WRONG),
    Overloaded: Code(429, grpc.StatusCode.RESOURCE_EXHAUSTED, "overloaded_error", retry=True, retry_after_s=1),
    LimitReached: Code(
        429,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "rate_limit_error",
        retry=True,
        retry_after_s=1,
        code="rate_limit_exceeded",
    ),
    KeyRefused: Code(401, grpc.StatusCode.UNAUTHENTICATED, "authentication_error", retry=False, code="invalid_api_key"),
    Unavailable: Code(503, grpc.StatusCode.UNAVAILABLE, "unavailable_error", retry=True, retry_after_s=5),
    # The work was done and thrown away; a repetition would take as long.
    DeadlineExceeded: Code(504, grpc.StatusCode.DEADLINE_EXCEEDED, "deadline_exceeded_error", retry=False),
    Cancelled: Code(499, grpc.StatusCode.CANCELLED, "cancelled_error"),
    NumericalError: Code(500, grpc.StatusCode.ABORTED, "numerical_error", retry=False),
    # An operator's mistakes: their messages name files and settings that clients must not see.
    CheckpointError: INTERNAL,
    ConfigError: INTERNAL,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """An error for a client. `key`: the name of the key whose limit is reached."""

    code: Code
    message: str
    problems: tuple[FieldError, ...] = ()
    retry_after_s: int | None = None
    key: str | None = None


def code_of(error: BaseException) -> Code:
    """The row of the nearest class in the table; INTERNAL for any foreign error."""
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), INTERNAL)


def describe(error: BaseException, request_id: str = "") -> Failure:
    """The error for the client. An internal error is logged with its traceback under an id, and the client gets only
    the id.
    """
    code = code_of(error)
    if not code.public:
        error_id = secrets.token_hex(6)
        logger.error("request %s: internal error %s", request_id or "?", error_id, exc_info=error)
        return Failure(code, f"internal error; the service's log has the details under {error_id}")
    problems = error.problems[:_MAX_PROBLEMS] if isinstance(error, InvalidRequest) else ()
    shown = tuple(FieldError(one_line(p.field), one_line(p.message)) for p in problems)
    message = one_line("; ".join(map(str, shown)) or str(error), _MAX_MESSAGE)
    key = error.key if isinstance(error, LimitReached) else None
    return Failure(code, message, shown, _retry_after_s(error, code), key)


def _retry_after_s(error: BaseException, code: Code) -> int | None:
    """Whole seconds: this error's own hint, else the usual one of its kind."""
    if isinstance(error, Overloaded) and error.retry_after_s is not None:
        return math.ceil(error.retry_after_s)
    return code.retry_after_s
