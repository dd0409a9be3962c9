"""Failures over HTTP: what a status, its headers and a body in OpenAI's shape say. Knows no call."""

import json
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from twotower_client.errors import Details, FieldViolation, ServiceError, UnexpectedAnswer, error_of

# By the answer's type, where it is one of ours; else by its status.
_BY_TYPE = {
    "authentication_error": "UNAUTHENTICATED",
    "rate_limit_error": "RESOURCE_EXHAUSTED",
    "overloaded_error": "RESOURCE_EXHAUSTED",
    "unavailable_error": "UNAVAILABLE",
    "deadline_exceeded_error": "DEADLINE_EXCEEDED",
    "cancelled_error": "CANCELLED",
    "numerical_error": "ABORTED",
    "internal_error": "INTERNAL",
}
_BY_STATUS = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def unexpected(what: str, error: object, request_id: str) -> UnexpectedAnswer:
    return UnexpectedAnswer(
        f"{what}: the answer is not from this service: {error!r:.200}", Details("UNKNOWN", request_id=request_id)
    )


def error_from(status: int | None, headers: Mapping[str, str], data: bytes, request_id: str) -> ServiceError:
    """What an answer that is no 200 says, or an event that tells an error (`status` None)."""
    message, kind, param = _error_in(data)
    by_status = "INVALID_ARGUMENT" if status is not None and 400 <= status < 500 else "UNKNOWN"
    name = _BY_TYPE.get(kind) or _BY_STATUS.get(status or 0) or ("INVALID_ARGUMENT" if kind else by_status)
    told = Details(
        name,
        status,
        request_id,
        retry_after_s=_retry_after_s(headers.get("retry-after")),
        violations=(FieldViolation(param, message),) if param else (),
        keys_limit=kind == "rate_limit_error",
    )
    return error_of(message or f"HTTP status {status}", told)


def _error_in(data: bytes) -> tuple[str, str, str]:
    """Message, type and param of OpenAI's shape; a gateway's own words where it is another."""
    try:
        error = json.loads(data)["error"]
        return tuple(str(error.get(name) or "") for name in ("message", "type", "param"))  # type: ignore[return-value]
    except (ValueError, LookupError, TypeError, AttributeError):
        return " ".join(data[:400].decode(errors="replace").split()), "", ""


def _retry_after_s(told: str | None) -> float | None:
    """Seconds, or a date, as gateways may write it."""
    if told is None:
        return None
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
