"""The exchange's two ends and what crosses it.

The denoiser's end is a `Link`, the context tower's a `Port`; one context engine serves a port per denoiser. A
sequence is named by a number its denoiser engine never uses twice on one link, so a late message about a sequence
that is gone cannot be taken for one about its slot's next tenant. Besides its `Release` a sequence has at most one
unanswered command: the next commit follows the delta of the last, so the Mamba states a delta waits to carry cannot
run ahead of it.

But for `close`, neither end ever blocks the engine that calls it. Whatever waits, waits in the implementation's own
threads, with a deadline; when the other side is gone, `poll` says so once with `LinkLost` and `Port.lost` is set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from twotower.errors import TwoTowerError
from twotower.model.cache import TowerCache


@dataclass(frozen=True, slots=True)
class Prefill:
    """Read these tokens as a new sequence, with room reserved for `reserve` positions. May be empty."""

    sequence: int
    token_ids: tuple[int, ...]
    reserve: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Read a block on. `start` is the position of its first token; anything else than the next one is an error."""

    sequence: int
    start: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Attach:
    """Take over a sequence: `token_ids` is all the caller knows of it (prompt and committed).

    Whichever side is behind catches up: the context engine reads what it lacks, the answering delta carries the whole
    cache and the ids the caller lacks. Two different histories are an error. A lost link takes its sequences with it:
    on a new link the context engine reads everything again. No engine sends this yet.
    """

    sequence: int
    token_ids: tuple[int, ...]
    reserve: int


@dataclass(frozen=True, slots=True)
class Release:
    """Forget the sequence. Answered by `Released`."""

    sequence: int


Command = Prefill | Commit | Attach | Release


@dataclass(frozen=True, slots=True)
class Delta:
    """Positions [start, end) have been read and are in `Link.cache` at `slot`.

    `complete` is False for the chunks of a prompt but the last: the Mamba states come with the last one only.
    `token_ids` are the ids an `Attach`'s caller lacked. On the way out of a port `slot` is the context cache's slot;
    out of `poll` it is a slot of `Link.cache`.
    """

    sequence: int
    start: int
    end: int
    slot: int
    complete: bool = True
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The context side cannot go on with this sequence. It still has to be released."""

    sequence: int
    error: TwoTowerError


@dataclass(frozen=True, slots=True)
class Released:
    """Both sides have given the sequence's slot and pages back."""

    sequence: int


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The other side is gone; nothing more will come. Every sequence of the link has ended."""

    reason: str


Reply = Delta | Failed | Released
LinkEvent = Reply | LinkLost


class Link(Protocol):
    """The denoiser's end. All methods are called from the denoiser engine's thread."""

    cache: TowerCache

    def submit(self, commands: Sequence[Command], reading: bool = False) -> None:
        """Send commands, in order. Never blocks. `Prefill` and `Attach` take their mirror slot here (Overloaded).

        `reading`: the caller goes on reading these sequences in `cache` until it polls (mock-AR steps on a token while
        the context tower reads it), so what answers them must not be written before. Otherwise it may be, at any time.
        Called in every tick, without commands too: what the link itself has to say since `poll` goes along.
        """
        ...

    def poll(self) -> list[LinkEvent]:
        """What has arrived since the last call, by now written into `cache`. Never blocks."""
        ...

    def close(self) -> None:
        """End the link, waiting a few seconds at most for its threads. The port sees it as lost."""
        ...


class Port(Protocol):
    """The context tower's end of one link. All methods are called from the context engine's thread.

    `apart`: the denoiser computes while the context tower does (`split` placement).
    """

    apart: bool

    @property
    def lost(self) -> str | None:
        """Why the other side is gone; None while it is there."""
        ...

    def receive(self) -> list[Command]:
        """Commands that have arrived since the last call, in order. Never blocks."""
        ...

    def send(self, replies: Sequence[Reply]) -> None:
        """Send replies, in order, a delta's tensors with it (read from the context cache now or as soon as a buffer
        is free, but never after the `Released` of the same sequence was sent). Never blocks."""
        ...

    def close(self) -> None:
        """End the link, waiting a few seconds at most for its threads. The denoiser's end sees it as lost."""
        ...
