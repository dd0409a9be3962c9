"""What forwards cost here, measured while they run: seconds by kind of pass and number of rows, smoothed.

A reading is the time until the host knows a pass's outcome, for which it waits anyway. Knows no device and no mode.
"""

from dataclasses import dataclass
from enum import Enum

_WEIGHT = 0.2  # of the newest reading
_MOST = (
    3.0  # times what was known, that a reading counts for at most: a pass that is recorded takes fifty times as long
)
_FIXED = 0.5  # share of a pass's time that does not depend on its rows, where only one number of rows is known


class Pass(Enum):
    """A denoiser's step; the context tower's read of blocks with a verdict; its step of a token a row."""

    STEP = "step"
    READ = "read"
    TOKEN = "token"


@dataclass(slots=True)
class _Mean:
    """Of passes with about so many rows."""

    rows: float
    seconds: float

    def note(self, rows: int, seconds: float) -> None:
        self.rows += _WEIGHT * (rows - self.rows)
        self.seconds += _WEIGHT * (min(seconds, _MOST * self.seconds) - self.seconds)


class Meter:
    """Readings of one engine. Numbers of rows between two powers of two share a mean."""

    def __init__(self) -> None:
        self._means: dict[Pass, dict[int, _Mean]] = {kind: {} for kind in Pass}

    def note(self, kind: Pass, rows: int, seconds: float) -> None:
        """A pass of this kind took so long."""
        means, place = self._means[kind], max(rows, 1).bit_length()
        if place in means:
            means[place].note(rows, seconds)
        else:
            means[place] = _Mean(rows, seconds)

    def seconds(self, kind: Pass, rows: int) -> float | None:
        """Of a pass with so many rows; None where no pass of this kind has been seen.

        Between two means on the line through them, and beyond the last on the line through the last two, which never
        falls. Fewer rows than any that were seen take as long as the fewest.
        """
        means = sorted(self._means[kind].values(), key=lambda mean: mean.rows)
        if not means:
            return None
        if len(means) == 1:
            [only] = means
            return only.seconds * (_FIXED + (1 - _FIXED) * rows / only.rows if rows > only.rows else 1)
        if rows <= means[0].rows:
            return means[0].seconds
        upper = next((n for n, mean in enumerate(means) if mean.rows >= rows), len(means) - 1)
        before, after = means[upper - 1], means[upper]
        slope = max(0.0, (after.seconds - before.seconds) / (after.rows - before.rows))
        return before.seconds + slope * (rows - before.rows)
