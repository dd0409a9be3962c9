"""What forwards cost here, measured while they run: seconds by kind of pass and number of rows, smoothed.

A reading is the time until the host knows a pass's outcome, for which it waits anyway. What else a machine does slows
all kinds of pass alike, so how fast it is just now is a number of its own. With it a kind that has not been seen for a
while still compares with one that has. Knows no device and no mode.
"""

from dataclasses import dataclass
from enum import Enum

_SPEED, _OWN = 0.2, 0.05  # what of a reading's surprise is the machine's, and what this pass's
_OLD, _OWN_OLD = 64, 0.5  # readings after which it is taken for the pass's alone
_MOST = 3.0  # times what was expected, that a reading counts for: a pass that is recorded takes fifty times as long
_FIXED = 0.5  # share of a pass's time that does not depend on its rows, where only one number of rows is known


class Pass(Enum):
    """A denoiser's step; the context tower's read of blocks with a verdict; its step of a token a row."""

    STEP = "step"
    READ = "read"
    TOKEN = "token"


@dataclass(slots=True)
class _Mean:
    """Of passes with about so many rows: seconds on a machine of speed 1, and the number of the last reading."""

    rows: float
    seconds: float
    last: int


class Meter:
    """Readings of one engine. Numbers of rows between two powers of two share a mean.

    `apart`: the denoiser's steps run on another machine than the context tower's passes.
    """

    def __init__(self, apart: bool = False) -> None:
        self._means: dict[Pass, dict[int, _Mean]] = {kind: {} for kind in Pass}
        self._speed = [1.0, 1.0]  # seconds for what takes one: of the context tower's machine, of the denoiser's
        self._machine = {kind: int(apart and kind is Pass.STEP) for kind in Pass}
        self._last: tuple[Pass, int, float] | None = None
        self._readings = 0

    def note(self, kind: Pass, rows: int, seconds: float) -> None:
        """A pass of this kind took so long. Told again by each of its rows, it counts once."""
        reading, self._last = self._last, (kind, rows, seconds)
        if reading == self._last or seconds <= 0:
            return
        self._readings += 1
        machine, place = self._machine[kind], max(rows, 1).bit_length()
        mean = self._means[kind].get(place)
        if mean is None:
            self._means[kind][place] = _Mean(rows, seconds / self._speed[machine], self._readings)
            return
        is_old, mean.last = self._readings - mean.last > _OLD, self._readings
        ratio = min(seconds / (mean.seconds * self._speed[machine]), _MOST)
        if not is_old:
            self._speed[machine] *= ratio**_SPEED
        mean.seconds *= ratio ** (_OWN_OLD if is_old else _OWN)
        mean.rows += _OWN * (rows - mean.rows)

    def seconds(self, kind: Pass, rows: int) -> float | None:
        """Of a pass with so many rows; None where no pass of this kind has been seen.

        Between two means on the line through them, and beyond the last on the line through the last two, which never
        falls. Fewer rows than any that were seen take as long as the fewest.
        """
        means = sorted(self._means[kind].values(), key=lambda mean: mean.rows)
        return _at(rows, means) * self._speed[self._machine[kind]] if means else None


def _at(rows: int, means: list[_Mean]) -> float:
    if len(means) == 1:
        [only] = means
        return only.seconds * (_FIXED + (1 - _FIXED) * rows / only.rows if rows > only.rows else 1)
    if rows <= means[0].rows:
        return means[0].seconds
    upper = next((n for n, mean in enumerate(means) if mean.rows >= rows), len(means) - 1)
    before, after = means[upper - 1], means[upper]
    slope = max(0.0, (after.seconds - before.seconds) / (after.rows - before.rows))
    return before.seconds + slope * (rows - before.rows)
