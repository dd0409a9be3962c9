"""Cells that live, die and refuse as a script says: one entry for each time that a run is placed."""

import asyncio
from collections.abc import Sequence, Set
from dataclasses import dataclass

from tests.cluster.fakes import BLOCK, FINGERPRINT, VOCABULARY
from twotower.core import AnswerEvent, AnyRequest, BlockEvent, FinishReason, Mode, Request, ScoreEvent
from twotower.errors import TwoTowerError, Unavailable

GONE = Unavailable("the cell is gone")


@dataclass(frozen=True)
class Stay:
    """What one cell does with a run: `events` of its own, then `error`; without an error it answers to the end.

    `refuses` instead of taking it. `starts`: where the events claim to start, if not where they do. `pace_s`: between
    two events.
    """

    events: int = 0
    error: TwoTowerError | None = None
    refuses: TwoTowerError | None = None
    cell: str = ""
    fingerprint: str = FINGERPRINT
    vocabulary: str = VOCABULARY
    starts: tuple[int, ...] = ()
    pace_s: float = 0.0


WELL = Stay()


class Script:
    """Cells of which the first is `stays[0]`'s, and so on; the last stay is everyone's after it."""

    def __init__(
        self, answer: Sequence[int], stays: Sequence[Stay], width: int = BLOCK, living: Sequence[str] = ()
    ) -> None:
        self.answer, self.stays, self.width, self.living = tuple(answer), list(stays), width, set(living)
        self.placed: list[tuple[AnyRequest, frozenset[str]]] = []
        self.timeouts: list[float] = []
        self.leaving = set[str]()
        self.open = 0
        self.lacking = False
        self.chosen = Mode.AR  # for each block of `auto`

    @property
    def committed(self) -> list[int]:
        """How many tokens each cell that was asked was told of."""
        return [len(request.committed) for request, _ in self.placed if isinstance(request, Request)]

    async def place(self, request: AnyRequest, timeout_s: float, avoid: Set[str]) -> "ScriptedStay":
        stay = self.stays[min(len(self.placed), len(self.stays) - 1)]
        self.placed.append((request, frozenset(avoid)))
        self.timeouts.append(timeout_s)
        await asyncio.sleep(0)
        if stay.refuses is not None:
            raise stay.refuses
        self.open += 1
        return ScriptedStay(self, request, stay, stay.cell or f"cell{len(self.placed)}")

    def is_to_leave(self, cell: str, request: AnyRequest, fingerprint: str) -> bool:
        return cell in self.leaving

    def elsewhere(self, request: AnyRequest, avoid: Set[str]) -> bool:
        return bool(self.living - avoid)

    def lacks(self, request: AnyRequest) -> bool:
        return self.lacking

    async def served(self) -> Set[Mode]:
        return frozenset(Mode) if self.living else frozenset()


class ScriptedStay:
    """A run's stay on one of them."""

    def __init__(self, script: Script, request: AnyRequest, stay: Stay, cell: str) -> None:
        self.cell, self.fingerprint, self.vocabulary = cell, stay.fingerprint, stay.vocabulary
        self._script, self._request, self._stay = script, request, stay
        self._given = 0
        self._closed = False

    async def next(self) -> AnswerEvent:
        await asyncio.sleep(self._stay.pace_s)
        if self._given == self._stay.events and self._stay.error is not None:
            raise self._stay.error
        self._given += 1
        if not isinstance(self._request, Request):
            scored = len(self._request.token_ids) - self._request.start
            return ScoreEvent(self._request.id, (-0.5,) * scored, (True,) * scored, 1.0)
        script, place = self._script, self._given - 1
        start = len(self._request.committed) + place * script.width
        if place < len(self._stay.starts):
            start = self._stay.starts[place]
        part = script.answer[start : start + script.width]
        last = FinishReason.LENGTH if start + len(part) >= len(script.answer) else None
        drafted = len(part) if self._request.params.mode is Mode.VERIFIED else 0
        accepted = max(0, drafted - 1)
        chosen = script.chosen if self._request.params.mode is Mode.AUTO else None
        by_mode = {"num_ar_blocks": int(chosen is Mode.AR), "num_diffusion_blocks": int(chosen is Mode.DIFFUSION)}
        drafts = {"num_drafted": drafted, "num_accepted": accepted}
        return BlockEvent(self._request.id, start, part, 2, 1, last, **drafts, **by_mode)

    async def close(self) -> None:
        assert not self._closed
        self._closed = True
        self._script.open -= 1
