"""What can go wrong with a call, the same over both faces.

    ServiceError
    ├── InvalidRequest       the request cannot be served as it is; `violations` says which fields
    ├── NotFound             no such model, path or method
    ├── Unauthenticated      no key, or one that the service does not know
    ├── Overloaded           no room now; `retry_after_s` says when there may be some
    │   └── RateLimited      the key allows no more now
    ├── Unavailable          nobody answers, or what would serve the request is gone
    ├── TlsMistake           a wrong certificate or name, or one side does not speak TLS
    ├── DeadlineExceeded     the deadline passed, the service's or the caller's
    ├── Cancelled            the call was given up
    ├── NumericalError       a tower produced NaN or infinity
    ├── InternalError        a fault of the service; its log has the details
    └── UnexpectedAnswer     what answered is no service of ours

`code` is gRPC's name of the kind over both faces. All of them survive pickling.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One thing wrong with one field of a request, under the name that the field has over this face."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Details:
    """The known facts about a failure beside its kind and message.

    `status`: of HTTP. `request_id`: the caller's label, the same in all attempts. `service_id`: the last attempt's id
    in the service's log. `retry_after_s`: the service's hint for a retry. `attempts`: how often the request was sent.
    `keys_limit`: whether a key's limit is reached.
    """

    code: str
    status: int | None = None
    request_id: str = ""
    service_id: str = ""
    retry_after_s: float | None = None
    violations: tuple[FieldViolation, ...] = ()
    attempts: int = 1
    keys_limit: bool = False


class ServiceError(Exception):
    """Base of all errors of a call."""

    def __init__(self, message: str, details: Details) -> None:
        super().__init__(message, details)
        self.message, self.details = message, details

    def __str__(self) -> str:
        return self.message

    @property
    def code(self) -> str:
        return self.details.code

    @property
    def status(self) -> int | None:
        return self.details.status

    @property
    def request_id(self) -> str:
        return self.details.request_id

    @property
    def service_id(self) -> str:
        return self.details.service_id

    @property
    def retry_after_s(self) -> float | None:
        return self.details.retry_after_s

    @property
    def violations(self) -> tuple[FieldViolation, ...]:
        return self.details.violations

    @property
    def attempts(self) -> int:
        return self.details.attempts

    @property
    def can_retry(self) -> bool:
        """Whether the same request may succeed later. A full service gives a hint; an error without a hint (a message
        above gRPC's limit) never gets room.
        """
        return isinstance(self, Unavailable) or (isinstance(self, Overloaded) and self.retry_after_s is not None)

    def after(self, attempts: int) -> "ServiceError":
        """The same error, for a request that was sent so often."""
        return type(self)(self.message, replace(self.details, attempts=attempts))


class InvalidRequest(ServiceError):
    """The request cannot be served as it is."""

    @classmethod
    def of(cls, field: str, description: str, request_id: str = "") -> "InvalidRequest":
        """An error found before anything was sent."""
        violation = FieldViolation(field, description)
        about = Details("INVALID_ARGUMENT", request_id=request_id, violations=(violation,), attempts=0)
        return cls(f"{field}: {description}", about)


class NotFound(ServiceError):
    """No such model, path or method."""


class Unauthenticated(ServiceError):
    """No key, or one that the service does not know."""


class Overloaded(ServiceError):
    """No room now."""


class RateLimited(Overloaded):
    """The key allows no more now."""


class Unavailable(ServiceError):
    """Nobody answers, or what would serve the request is gone."""


class TlsMistake(ServiceError):
    """Certificate, name or scheme are wrong; the message says what was got and wanted. A retry does not help."""


class DeadlineExceeded(ServiceError):
    """The deadline passed."""


class Cancelled(ServiceError):
    """The call was given up."""


class NumericalError(ServiceError):
    """A tower produced NaN or infinity."""


class InternalError(ServiceError):
    """A fault of the service."""


class UnexpectedAnswer(ServiceError):
    """What answered is no service of ours."""


KINDS: dict[str, type[ServiceError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "NOT_FOUND": NotFound,
    "UNIMPLEMENTED": NotFound,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": Unauthenticated,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "ABORTED": NumericalError,
    "UNKNOWN": UnexpectedAnswer,
}


def error_of(message: str, details: Details) -> ServiceError:
    """The error of this code; InternalError for an unknown code."""
    kind = RateLimited if details.keys_limit else KINDS.get(details.code, InternalError)
    return kind(message, details)
