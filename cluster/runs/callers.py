"""Who asks: what is kept fair between callers knows them by this, and what their keys allow them."""

from dataclasses import dataclass, field
from typing import Protocol

from twotower.errors import TwoTowerError


class KeyRefused(TwoTowerError):
    """A key is wanted, and there is none or it is not known. `reason`: in two words, for operators."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class Limits:
    """What a key allows at one router; None: no less than others have. `priority_from`: no request asks for a lower
    priority number, which would go first. `whole`: the first two of all routers together."""

    concurrent_requests: int | None = None
    tokens_per_minute: int | None = None
    priority_from: int | None = None
    whole: tuple[int | None, int | None] | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """The address that a call comes from or, where keys are wanted, the name of its key. Limits may change."""

    name: str
    limits: Limits = field(default=Limits(), compare=False)
    has_key: bool = False

    @property
    def key(self) -> str | None:
        """Its key's name. Addresses are told to nobody."""
        return self.name if self.has_key else None


NOBODY = Caller("")


class Door(Protocol):
    """Who may ask. `names`: of keys, where they are wanted. `watch` keeps it right, for ever."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def fault(self) -> str:
        """Why a changed file of keys cannot be taken, so that the keys of before stay; empty where it can."""
        ...

    def caller(self, key: str | None, address: str) -> Caller:
        """Of a call with this key, or none. Raises KeyRefused."""
        ...

    async def watch(self) -> None: ...


class OpenDoor:
    """Everybody, whatever key a client sends: OpenAI's always send one."""

    names: tuple[str, ...] = ()
    fault: str = ""

    def caller(self, key: str | None, address: str) -> Caller:
        return Caller(address)

    async def watch(self) -> None:
        """There is nothing to watch."""
