"""Costs of forwards, measured while they run: seconds by kind of pass and number of rows.

A cost is a median of readings: a single reading may be far too long, like that of a first pass or a recording. Knows no
device and no mode.
"""

from collections import deque
from collections.abc import Sequence
from enum import Enum
from math import log2
from statistics import median, median_low

_KEPT = 21  # readings kept for about the same number of rows
_FEWEST = 5  # readings needed for a median
_FORGOTTEN = 4096  # a number of rows unseen for so many readings counts as never seen
_NEAR = 0.1  # squared distance in powers of two: nearer numbers of rows get equal weight


class Pass(Enum):
    """A denoiser's step; the context tower's read of blocks with a verdict; its step of a token a row."""

    STEP = "step"
    READ = "read"
    TOKEN = "token"


class _Seen:
    """Passes with about the same number of rows: the newest readings, and their medians. `last`: the number of the
    newest.
    """

    def __init__(self) -> None:
        self._readings: deque[tuple[int, float]] = deque(maxlen=_KEPT)
        self.rows = self.seconds = 0.0
        self.last = 0

    def note(self, rows: int, seconds: float, number: int) -> None:
        self._readings.append((rows, seconds))
        self.rows = median(rows for rows, _ in self._readings)
        self.seconds = median_low(seconds for _, seconds in self._readings)
        self.last = number

    @property
    def is_sure(self) -> bool:
        return len(self._readings) >= _FEWEST


class Meter:
    """Readings of one engine. Numbers of rows between two powers of two share a median."""

    def __init__(self) -> None:
        self._seen: dict[Pass, dict[int, _Seen]] = {kind: {} for kind in Pass}
        self._last: tuple[Pass, int, float] | None = None
        self._readings = 0

    def note(self, kind: Pass, rows: int, seconds: float) -> None:
        """A pass of this kind took so long. Each of its rows reports the pass; it counts once."""
        reading, self._last = self._last, (kind, rows, seconds)
        if reading == self._last or seconds <= 0:
            return
        self._readings += 1
        self._seen[kind].setdefault(max(rows, 1).bit_length(), _Seen()).note(rows, seconds, self._readings)

    def seconds(self, kind: Pass, rows: int) -> float | None:
        """The cost of a pass with so many rows; None if too few passes of this kind have been seen."""
        sure = [seen for seen in self._seen[kind].values() if seen.is_sure]
        recent = [seen for seen in sure if self._readings - seen.last < _FORGOTTEN] or sure
        return _at(rows, recent) if recent else None


def _at(rows: int, seen: Sequence[_Seen]) -> float:
    """The value on the line through the medians; those of about as many rows count most.

    More rows never take less, nor more than in proportion. A single median gives no line: more rows are then assumed to
    take no longer, so that they get tried and measured.
    """
    weights = [1 / (one.seconds**2 * (_NEAR + log2(one.rows / max(rows, 1)) ** 2)) for one in seen]
    total = sum(weights)
    x = sum(weight * one.rows for weight, one in zip(weights, seen, strict=True)) / total
    y = sum(weight * one.seconds for weight, one in zip(weights, seen, strict=True)) / total
    spread = sum(weight * (one.rows - x) ** 2 for weight, one in zip(weights, seen, strict=True))
    rise = sum(weight * (one.rows - x) * (one.seconds - y) for weight, one in zip(weights, seen, strict=True))
    slope = min(max(rise / spread, 0.0), y / x) if spread > 0 else 0.0
    return y + slope * (rows - x)
