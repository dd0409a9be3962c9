"""Beats of cells that say how they and their towers are, and a board that hears them on a clock of the test's."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.board.board import Board
from cluster.board.part import Deployed, Part
from cluster.runs.admission import Admission
from cluster.runs.messages import Beat
from cluster.runs.signs import CellSign, TowerSign
from cluster.runs.turns import Turns
from twotower.core import Mode

MODES = tuple(Mode)
DEPLOYED = Deployed("demo", "f00d", "0.2.0", "abcd1234", MODES, min_cells=1, max_cells=4, routers=1)


def tower(name: str, answers: bool = True, **told: Any) -> TowerSign:
    return replace(TowerSign(name, 100, "cpu", answers, slots=8, free_slots=8, pages=64, free_pages=64), **told)


def beat(cell: str, modes: Sequence[Mode] = MODES, mending_s: float = 0.0, *towers: TowerSign) -> Beat:
    both = towers or (tower("context", busy=0.25), tower("denoiser", busy=0.75, commit_wait=0.125, exchange_rate=1e6))
    return Beat(cell, "f00d", tuple(modes), 3, 1, 8, CellSign("10.0.0.1", "split", mending_s, 0, both))


@dataclass
class Hearing:
    """A board, and what it hears. `now`: seconds since the epoch."""

    name: str = "r1"
    deployed: Deployed = DEPLOYED
    now: float = 1000.0
    heard: list[Beat] = field(default_factory=list)
    is_ready: bool = True

    def __post_init__(self) -> None:
        self.board = Board(self.name, "10.0.0.9", self.deployed, lambda: self.now)
        self.admission, self.turns = Admission(64, 8), Turns(lambda: 8, clock=lambda: self.now)
        lines: Any = self
        self.board.hold(self.admission, self.turns, lines, lambda: self.is_ready)

    def beats(self) -> list[Beat]:
        """As CellLines has them."""
        return self.heard

    def tick(self, seconds: int = 1) -> None:
        for _ in range(seconds):
            self.now += 1.0
            self.board.tick()

    def part(self) -> Part:
        return self.board.part({})
