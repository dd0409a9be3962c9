"""How near `auto` comes to the best fixed mode, on a machine that is made up: costs are known, so nothing is noise.

Both towers take turns on it, as in a colocated cell. Costs are about those of the demo on a CPU.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from twotower.core import DecodingParams, Mode
from twotower.engine.meter import Meter, Pass
from twotower.engine.modes.auto import Auto, Weighed
from twotower.engine.modes.drafting import Drafting, Drafts

SIZE = 16
SECONDS = {
    Pass.STEP: lambda rows: 0.010 + 0.0031 * rows,
    Pass.READ: lambda rows: 0.008 + 0.0032 * rows,
    Pass.TOKEN: lambda rows: 0.0055 + 0.0007 * rows,
}
FROM_S, TO_S = 15.0, 75.0  # what is counted of a run


class Never:
    """`ar`."""

    def ended(self, steps: int, tokens: int) -> None:
        pass

    def alone(self, room: int) -> int:
        return 1


@dataclass
class Row:
    """A client, its request's drafts, and what the request waits for."""

    good: bool
    drafts: Drafts
    room: int
    steps: int = 0  # that its draft still takes
    reading: bool = False
    alone: int = 0
    written: int = 0
    asks: bool = True
    drafted: bool = False


@dataclass
class Machine:
    """Rows that are decoded by one rule, and the tokens that came of it."""

    rows: list[Row]
    new: Callable[[], Drafts]
    draw: random.Random
    meter: Meter
    look: Callable[[int], None]
    clock: float = 0.0
    tokens: int = 0
    read_last: bool = False
    lengths: list[int] = field(default_factory=lambda: [12, 20, 64, 200])

    def run(self) -> float:
        """Tokens a second."""
        before = 0
        while self.clock < TO_S:
            self._context()
            self._denoiser()
            before = self.tokens if self.clock < FROM_S else before
        return (self.tokens - before) / (TO_S - FROM_S)

    def _took(self, kind: Pass, rows: int) -> None:
        self.clock += SECONDS[kind](rows)
        self.meter.note(kind, rows, SECONDS[kind](rows))

    def _context(self) -> None:
        drafts, alone = [row for row in self.rows if row.reading], [row for row in self.rows if row.alone]
        if drafts and not (alone and self.read_last):
            self.read_last = True
            self._took(Pass.READ, len(drafts))
            for row in drafts:
                accepted = min(self._accepted(row), SIZE - 1, row.room - 1)
                row.reading = False
                self._got(row, 1 if row.good else 2, accepted)
        elif alone:
            self.read_last = False
            self._took(Pass.TOKEN, len(alone))
            for row in alone:
                row.written += 1
                if row.written == row.alone:
                    row.alone = 0
                    self._got(row, 0, row.written)

    def _accepted(self, row: Row) -> int:
        stands = 0.98 if row.good else 0.2
        return next((n for n in range(SIZE) if self.draw.random() > stands), SIZE)

    def _got(self, row: Row, steps: int, tokens: int) -> None:
        row.drafts.ended(steps, tokens)
        row.drafted = steps > 0
        count = tokens + bool(steps)
        self.tokens, row.room, row.asks = self.tokens + count, row.room - count, True

    def _denoiser(self) -> None:
        self.look(len(self.rows))
        for row in self.rows:
            if row.asks:
                self._choose(row)
        stepping = [row for row in self.rows if row.steps]
        if stepping:
            self._took(Pass.STEP, len(stepping))
        for row in stepping:
            row.steps -= 1
            row.reading = not row.steps

    def _choose(self, row: Row) -> None:
        if row.room <= 0:
            row.drafts, row.room = self.new(), self.draw.choice(self.lengths)
        row.written, row.asks = 0, False
        if row.room == 1:  # nothing to draft
            row.alone, row.reading = int(not row.drafted), row.drafted
            return
        row.alone = min(row.drafts.alone(row.room), row.room)
        row.steps = 0 if row.alone else 1 if row.good else 2


def _pace(rule: str, clients: int, load: str) -> float:
    meter = Meter()
    auto = Auto(meter, apart=False)
    rules: dict[str, Callable[[], Drafts]] = {
        "ar": Never,
        "verified": Drafting,
        "auto": lambda: Weighed(auto, DecodingParams(Mode.AUTO)),
    }
    good = {"good": 1, "bad": 0}
    rows = [Row(bool(good.get(load, n % 2)), rules[rule](), 20) for n in range(clients)]
    return Machine(rows, rules[rule], random.Random(5), meter, auto.look).run()


@pytest.mark.parametrize("load", ["good", "bad", "mixed"])
@pytest.mark.parametrize(
    "clients", [1, 4, pytest.param(16, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)]
)
def test_auto_is_within_five_per_cent_of_the_best_fixed_mode(clients: int, load: str) -> None:
    pace = {rule: _pace(rule, clients, load) for rule in ("ar", "verified", "auto")}
    ratio = pace["auto"] / max(pace["ar"], pace["verified"])
    print(f"{load}, {clients} clients: {', '.join(f'{rule} {value:.0f}' for rule, value in pace.items())}: {ratio:.2f}")
    assert ratio >= 0.95
