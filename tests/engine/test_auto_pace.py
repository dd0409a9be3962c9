"""How near `auto` comes to the best fixed mode, on a machine that is made up.

Both towers take turns on it, as in a colocated cell. Costs are those of the demo on a CPU. As there, the first pass of
each size takes several times as long, and some take twice as long. All draws are fixed.
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
    Pass.STEP: lambda rows: 0.008 + 0.0018 * rows,
    Pass.READ: lambda rows: 0.0075 + 0.0025 * rows,
    Pass.TOKEN: lambda rows: 0.0063 + 0.0005 * rows,
}
PROMPT_S = (0.008, 0.004)  # a pass over prompts, and each of them
FIRST = (2, 4, 8)  # times as long, that the first pass of a size takes
COUNTED_S = 15.0  # of a run, once costs are known: five passes of a size take a while with many rows
ROOM = 64
LENGTHS = {
    True: (4, 8, 12, 14, 16, 18, 28, 64),
    False: tuple(range(40, 65)),
}  # of answers; nobody knows before they end


class Never:
    """`ar`."""

    def ended(self, steps: int, tokens: int) -> None:
        pass

    def alone(self, room: int) -> int:
        return 1


@dataclass
class Row:
    """A client. `room`: what its answer may still take, `left`: what it will. Of its block `steps` of a draft are to
    come, or its draft is `reading`, or `alone` tokens are written without."""

    good: bool
    drafts: Drafts
    room: int = 0
    left: int = 0
    prompt: bool = True
    asks: bool = False
    steps: int = 0
    reading: bool = False
    alone: int = 0
    written: int = 0
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
    turn: int = 0
    seen: set[tuple[Pass, int]] = field(default_factory=set)

    def run(self) -> float:
        """Tokens a second."""
        before, from_s = 0, 4 + len(self.rows) / 5
        while self.clock < from_s + COUNTED_S:
            self._context()
            self._denoiser()
            before = self.tokens if self.clock < from_s else before
        return (self.tokens - before) / COUNTED_S

    def _took(self, kind: Pass, rows: int) -> None:
        size = (kind, rows.bit_length())
        slower = (2 if self.draw.random() < 0.05 else 1) if size in self.seen else self.draw.choice(FIRST)
        self.seen.add(size)
        seconds = SECONDS[kind](rows) * slower * self.draw.uniform(0.9, 1.3)
        self.clock += seconds
        self.meter.note(kind, rows, seconds)

    def _context(self) -> None:
        """A pass: drafts, tokens alone and prompts in turns."""
        work = [
            ([row for row in self.rows if row.reading], self._read),
            ([row for row in self.rows if row.alone], self._write),
            ([row for row in self.rows if row.prompt], self._begin),
        ]
        for number in range(len(work)):
            rows, act = work[(self.turn + number) % len(work)]
            if rows:
                self.turn += number + 1
                act(rows)
                return

    def _begin(self, rows: list[Row]) -> None:
        self.clock += PROMPT_S[0] + PROMPT_S[1] * len(rows)
        for row in rows:
            row.drafts, row.prompt, row.drafted = self.new(), False, False
            row.room, row.left = ROOM, self.draw.choice(LENGTHS[row.good])
            self._got(row, 1)

    def _read(self, rows: list[Row]) -> None:
        self._took(Pass.READ, len(rows))
        for row in rows:
            accepted = min(self._accepted(row), SIZE - 1, row.left - 1)
            row.reading, row.drafted = False, True
            row.drafts.ended(1 if row.good else 2, accepted)
            self._got(row, accepted + 1)

    def _accepted(self, row: Row) -> int:
        stands = 0.985 if row.good else 0.7
        return next((n for n in range(SIZE) if self.draw.random() > stands), SIZE)

    def _write(self, rows: list[Row]) -> None:
        self._took(Pass.TOKEN, len(rows))
        for row in rows:
            row.written += 1
            if row.written == min(row.alone, row.left):
                row.alone, row.drafted = 0, False
                row.drafts.ended(0, row.written)
                self._got(row, row.written)

    def _got(self, row: Row, tokens: int) -> None:
        self.tokens, row.room, row.left = self.tokens + tokens, row.room - tokens, row.left - tokens
        row.prompt, row.asks = not row.left, row.left > 0

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
        row.written, row.asks = 0, False
        if row.room == 1:  # nothing to draft
            row.alone, row.reading = int(not row.drafted), row.drafted
            return
        row.alone = min(row.drafts.alone(row.room), row.room)
        row.steps = 0 if row.alone else 1 if row.good else 2


def _pace(rule: str, clients: int, load: str, seed: int = 1) -> float:
    meter = Meter()
    auto = Auto(meter, apart=False)
    rules: dict[str, Callable[[], Drafts]] = {
        "ar": Never,
        "verified": Drafting,
        "auto": lambda: Weighed(auto, DecodingParams(Mode.AUTO)),
    }
    good = {"good": 1, "bad": 0}
    rows = [Row(bool(good.get(load, n % 2)), rules[rule]()) for n in range(clients)]
    return Machine(rows, rules[rule], random.Random(seed), meter, auto.look).run()


QUICK = [(1, "good"), (4, "bad"), (16, "good"), (16, "mixed")]
ALL = [(clients, load) for clients in (1, 4, 16, 64) for load in ("good", "bad", "mixed")]


@pytest.mark.parametrize(
    ("clients", "load"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in ALL]
)
def test_auto_is_within_five_per_cent_of_the_best_fixed_mode(clients: int, load: str) -> None:
    pace = {rule: _pace(rule, clients, load) for rule in ("ar", "verified", "auto")}
    ratio = pace["auto"] / max(pace["ar"], pace["verified"])
    print(f"{load}, {clients} clients: {', '.join(f'{rule} {value:.0f}' for rule, value in pace.items())}: {ratio:.2f}")
    assert ratio >= 0.95
