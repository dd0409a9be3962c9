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
_FORGOTTEN = 4096  # readings after which a number of rows that was not seen again counts as never seen


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

        Between two means on the line through them. More rows than any that were seen are hoped to take no longer than
        the most, so that whoever chooses by cost will see.
        """
        means = sorted(self._means[kind].values(), key=lambda mean: mean.rows)
        recent = [mean for mean in means if self._readings - mean.last < _FORGOTTEN] or means
        return _at(rows, recent) * self._speed[self._machine[kind]] if recent else None


def _at(rows: int, means: list[_Mean]) -> float:
    before = next((mean for mean in reversed(means) if mean.rows <= rows), means[0])
    after = next((mean for mean in means if mean.rows > rows), means[-1])
    if rows < before.rows or after.rows <= before.rows:
        return before.seconds
    return before.seconds + (after.seconds - before.seconds) * (rows - before.rows) / (after.rows - before.rows)
