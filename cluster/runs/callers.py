"""Who asks: what is kept fair between callers knows them by this, and what their keys allow them."""

from dataclasses import dataclass, field
from typing import Protocol

from twotower.errors import TwoTowerError


class KeyRefused(TwoTowerError):
    """A key is wanted, and there is none or it is not known."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key allows at one router; None: no less than others have. `priority_from`: no request asks for a lower
    priority number, which would go first."""

    concurrent_requests: int | None = None
    tokens_per_minute: int | None = None
    priority_from: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """The address that a call comes from or, where keys are wanted, the name of its key. Limits may change."""

    name: str
    limits: Limits = field(default=Limits(), compare=False)


NOBODY = Caller("")


class Door(Protocol):
    """Who may ask. `names`: of keys, where they are wanted."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def caller(self, key: str | None, address: str) -> Caller:
        """Of a call with this key, or none. Raises KeyRefused."""
        ...


class OpenDoor:
    """Everybody, whatever key a client sends: OpenAI's always send one."""

    names: tuple[str, ...] = ()

    def caller(self, key: str | None, address: str) -> Caller:
        return Caller(address)
