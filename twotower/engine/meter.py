"""What forwards cost here, measured while they run: seconds by kind of pass and number of rows.

Readings are medians, because a single one may be far too long: its pass was recorded, or run for the first time. Knows
no device and no mode.
"""

from collections import deque
from collections.abc import Sequence
from enum import Enum
from math import log2
from statistics import median, median_low

_KEPT = 21  # readings of about so many rows
_FEWEST = 5  # of which a median says something
_FORGOTTEN = 4096  # readings after which a number of rows that was not seen again counts as never seen
_NEAR = 0.1  # of a power of two, squared: rows that are nearer than this count alike


class Pass(Enum):
    """A denoiser's step; the context tower's read of blocks with a verdict; its step of a token a row."""

    STEP = "step"
    READ = "read"
    TOKEN = "token"


class _Seen:
    """Passes with about so many rows: the newest readings, and their medians. `last`: the number of the newest."""

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
        """A pass of this kind took so long. Told again by each of its rows, it counts once."""
        reading, self._last = self._last, (kind, rows, seconds)
        if reading == self._last or seconds <= 0:
            return
        self._readings += 1
        self._seen[kind].setdefault(max(rows, 1).bit_length(), _Seen()).note(rows, seconds, self._readings)

    def seconds(self, kind: Pass, rows: int) -> float | None:
        """Of a pass with so many rows; None where too few of this kind have been seen."""
        sure = [seen for seen in self._seen[kind].values() if seen.is_sure]
        recent = [seen for seen in sure if self._readings - seen.last < _FORGOTTEN] or sure
        return _at(rows, recent) if recent else None


def _at(rows: int, seen: Sequence[_Seen]) -> float:
    """On the line through the medians, of which those of about as many rows count most.

    More rows never take less, nor more in proportion. Beside a single median there is no line: more rows are then hoped
    to take no longer, so that whoever chooses by cost will see.
    """
    weights = [1 / (one.seconds**2 * (_NEAR + log2(one.rows / max(rows, 1)) ** 2)) for one in seen]
    total = sum(weights)
    x = sum(weight * one.rows for weight, one in zip(weights, seen, strict=True)) / total
    y = sum(weight * one.seconds for weight, one in zip(weights, seen, strict=True)) / total
    spread = sum(weight * (one.rows - x) ** 2 for weight, one in zip(weights, seen, strict=True))
    rise = sum(weight * (one.rows - x) * (one.seconds - y) for weight, one in zip(weights, seen, strict=True))
    slope = min(max(rise / spread, 0.0), y / x) if spread > 0 else 0.0
    return y + slope * (rows - x)
