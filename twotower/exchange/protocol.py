"""The exchange's two ends and the messages between them.

The denoiser's end is a `Link`, the context tower's a `Port`; one context engine serves a port per denoiser. A denoiser
engine names a sequence by a number that it never uses twice on one link. So a late message about a sequence that is
gone cannot be taken for one about its slot's next tenant. Besides its `Release` a sequence has at most one unanswered
command: the next commit follows the delta of the last one. So the Mamba states that a delta waits to carry cannot run
ahead of it.

Except for `close`, neither end ever blocks the calling engine. All waiting is done in the implementation's own threads,
with a deadline. When the other side is lost, `poll` returns `LinkLost` once, and `Port.lost` is set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from twotower.core import DecodingParams, Likelihood
from twotower.errors import TwoTowerError
from twotower.model.cache import TowerCache


@dataclass(frozen=True, slots=True)
class Verifying:
    """The context tower decides a sequence's tokens, as `ar` would with these parameters. The answer's first token has
    the position `answer_start`."""

    params: DecodingParams
    answer_start: int


@dataclass(frozen=True, slots=True)
class Rating:
    """The context tower computes likelihoods of the tokens from position `start` on, with so many alternatives."""

    alternatives: int
    start: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """Read these tokens as a new sequence, with room reserved for `reserve` positions. May be empty.

    `verifying`: committed blocks are drafts. Only the part that `ar` would have written is read, and the answer has the
    next token, also after the prompt. `rating`: tokens are rated as they are read or decided. `cache_salt`: as in a
    Request.
    """

    sequence: int
    token_ids: tuple[int, ...]
    reserve: int
    verifying: Verifying | None = None
    rating: Rating | None = None
    cache_salt: str | None = ""


@dataclass(frozen=True, slots=True)
class Commit:
    """Read a block. `start` is the position of its first token; any other position than the next one is an error. A
    draft's first token is the one that was decided last.

    `alone`: the block is only that token. Before it answers, the context tower writes so many tokens after it, as `ar`
    would, or fewer if one of them ends the answer.
    """

    sequence: int
    start: int
    token_ids: tuple[int, ...]
    alone: int = 0


@dataclass(frozen=True, slots=True)
class Release:
    """Forget the sequence. Answered by `Released`."""

    sequence: int


Command = Prefill | Commit | Release


@dataclass(frozen=True, slots=True)
class Took:
    """The cost of a forward of the context tower: rows, in blocks of the usual width, and seconds until the host knew
    its outcome (`engine.steps.clock_for`).
    """

    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Decided:
    """The token after the read positions, and the smallest margin of the decisions for it and for them. `written`: the
    tokens before it that the context tower wrote alone. `took`: the last forward; None after a prompt.
    """

    token: int
    margin: float
    written: tuple[int, ...] = ()
    took: Took | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """Positions [start, end) have been read and are in `Link.cache` at `slot`.

    `complete` is False for all chunks of a prompt but the last: the Mamba states come only with the last one. Of a
    draft only the accepted part has been read, so `end` is the cut. `decided`: for a verified sequence. `likelihoods`:
    for a rated sequence, those of the last tokens up to `end`, or up to the decided one. `cached`: the positions come
    from a kept prefix. On the way out of a port `slot` is the context cache's slot; out of `poll` it is a slot of
    `Link.cache`.
    """

    sequence: int
    start: int
    end: int
    slot: int
    complete: bool = True
    decided: Decided | None = None
    likelihoods: tuple[Likelihood, ...] = ()
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """The context side cannot continue this sequence. The sequence still has to be released."""

    sequence: int
    error: TwoTowerError


@dataclass(frozen=True, slots=True)
class Released:
    """Both sides have freed the sequence's slot and pages."""

    sequence: int


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The other side is lost; nothing more will arrive. Every sequence of the link has ended."""

    reason: str


Reply = Delta | Failed | Released
LinkEvent = Reply | LinkLost


@dataclass(slots=True)
class Traffic:
    """Payloads that a link has received since it was connected: their number, their bytes, the seconds of receiving."""

    payloads: int = 0
    nbytes: int = 0
    seconds: float = 0.0


class Link(Protocol):
    """The denoiser's end. All methods are called from the denoiser engine's thread.

    `apart`: as a Port's.
    """

    apart: bool
    cache: TowerCache
    traffic: Traffic

    def submit(self, commands: Sequence[Command], reading: bool = False) -> None:
        """Send commands, in order. Never blocks. `Prefill` takes its mirror slot here (Overloaded).

        `reading`: the caller still reads these sequences in `cache` until it polls, so their deltas must not be written
        before. For example, mock-AR steps on a token while the context tower reads it. Other deltas may be written at
        any time, because the caller no longer reads these sequences. Called in every tick, also without commands: the
        link's own messages since `poll` are sent, too.
        """
        ...

    def poll(self) -> list[LinkEvent]:
        """The replies since the last call; their deltas are written into `cache` by now. Never blocks."""
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
        """Why the other side is lost; None while it is not."""
        ...

    def receive(self) -> list[Command]:
        """Commands that have arrived since the last call, in order. Never blocks."""
        ...

    def send(self, replies: Sequence[Reply]) -> None:
        """Send replies, in order, each delta with its tensors. Never blocks. The tensors are read from the context
        cache now, or as soon as a buffer is free, but never after the sequence's `Released` was sent.
        """
        ...

    def close(self) -> None:
        """End the link, waiting a few seconds at most for its threads. The denoiser's end sees it as lost."""
        ...
