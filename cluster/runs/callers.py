"""Callers: the names by which fairness distinguishes them, and their keys' limits."""

from dataclasses import dataclass, field
from typing import Protocol

from twotower.errors import TwoTowerError


class KeyRefused(TwoTowerError):
    """A key is required, and it is missing or unknown. `reason`: in two words, for operators."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class Limits:
    """A key's limits at one router; None: no limit. `priority_from`: the lowest priority number that a request may
    have; lower numbers go first. `whole`: the first two limits over all routers.
    """

    concurrent_requests: int | None = None
    tokens_per_minute: int | None = None
    priority_from: int | None = None
    whole: tuple[int | None, int | None] | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """The address of a call or, if keys are required, the name of its key. Limits may change."""

    name: str
    limits: Limits = field(default=Limits(), compare=False)
    has_key: bool = False

    @property
    def key(self) -> str | None:
        """The key's name. Addresses are never shown."""
        return self.name if self.has_key else None


NOBODY = Caller("")


class Door(Protocol):
    """The check of callers. `names`: the keys' names, if keys are required. `watch` keeps it up to date, for ever."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def fault(self) -> str:
        """Why a changed file of keys cannot be used, so that the old keys stay; empty if it can."""
        ...

    def caller(self, key: str | None, address: str) -> Caller:
        """The caller of a call with this key, or without one. Raises KeyRefused."""
        ...

    async def watch(self) -> None: ...


class OpenDoor:
    """Admits every caller and ignores keys: OpenAI's clients always send one."""

    names: tuple[str, ...] = ()
    fault: str = ""

    def caller(self, key: str | None, address: str) -> Caller:
        return Caller(address)

    async def watch(self) -> None:
        """There is nothing to watch."""
