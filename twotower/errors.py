"""Every error that a user or an operator can meet.

    TwoTowerError
    ├── InvalidRequest       the request cannot be served as it is; carries one FieldError per problem
    ├── CheckpointError      a checkpoint directory is incomplete, damaged or of another architecture
    ├── ConfigError          a setting of ours is wrong (a typo, an impossible value)
    ├── Overloaded           no room now; the same request may succeed later
    ├── Unavailable          the part that would serve the request is gone or not ready
    │   └── LinkDown         the exchange between two towers broke
    ├── DeadlineExceeded     the request's deadline passed
    ├── Cancelled            the client gave the request up
    └── NumericalError       a tower produced NaN or infinity for this request

Which HTTP status or gRPC code each becomes is decided in one table, `cluster/faces/error_codes.py`.
Every error survives pickling, because it crosses process boundaries.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing wrong with one field of a request."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class TwoTowerError(Exception):
    """Base of all errors raised on purpose."""


class InvalidRequest(TwoTowerError):
    """The request is wrong; `problems` says where and how."""

    def __init__(self, problems: Sequence[FieldError]) -> None:
        super().__init__(tuple(problems))
        self.problems = tuple(problems)

    @classmethod
    def of(cls, field: str, message: str) -> "InvalidRequest":
        return cls([FieldError(field, message)])

    def __str__(self) -> str:
        return "; ".join(map(str, self.problems))


class CheckpointError(TwoTowerError):
    """A checkpoint cannot be read; the message names file and tensor."""


class ConfigError(TwoTowerError):
    """A setting is wrong; the message names it."""


class Overloaded(TwoTowerError):
    """No room for the request now. `retry_after_s`: when there may be room, if known."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(TwoTowerError):
    """The serving part is gone or not ready."""


class LinkDown(Unavailable):
    """The exchange between two towers broke."""


class DeadlineExceeded(TwoTowerError):
    """The request's deadline passed before it finished."""


class Cancelled(TwoTowerError):
    """The client gave the request up."""


class NumericalError(TwoTowerError):
    """A tower produced NaN or infinity for this request."""
