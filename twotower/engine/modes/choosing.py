"""Which mode is fastest for an `auto` request, from the costs of passes and the results of earlier blocks. Only
arithmetic.
"""

from collections.abc import Collection
from dataclasses import dataclass

from twotower.core import Mode

_LEAST_LOST = 0.25  # of a try's cost: all these numbers are rough


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a pass over all present rows: a denoiser's step, a read with a verdict, a token for each row.

    `apart`: the towers compute at the same time, so that with several rows the slower one sets the pace.
    """

    step: float
    read: float
    token: float
    apart: bool = False

    def round_s(self, steps: float, reads: float = 1.0) -> float:
        """Seconds of a block with so many steps and reads."""
        stepping_s, reading_s = steps * self.step, reads * self.read
        return max(stepping_s, reading_s) if self.apart else stepping_s + reading_s


@dataclass(frozen=True, slots=True)
class Signs:
    """The results of earlier blocks: a draft's steps and accepted tokens; a `diffusion` block's steps, tokens and
    commits, if any was decoded. An answer's last block has no commit.
    """

    draft_steps: float
    accepted: float
    block_steps: float = 0.0
    block_tokens: float = 0.0
    block_commits: float = 1.0


def paces(costs: Costs, signs: Signs) -> dict[Mode, float]:
    """Tokens a second of each row, if all rows were decoded this way. A commit counts as much as a read
    with a verdict.
    """
    found = {
        Mode.AR: 1 / costs.token,
        Mode.VERIFIED: (signs.accepted + 1) / costs.round_s(signs.draft_steps),
    }
    if signs.block_steps:
        found[Mode.DIFFUSION] = signs.block_tokens / costs.round_s(signs.block_steps, signs.block_commits)
    return found


def fastest(found: dict[Mode, float], allowed: Collection[Mode], now: Mode | None = None, times: float = 1.0) -> Mode:
    """The fastest of the allowed modes; among equals the first in the order of `Mode`. A mode other than `now` has to
    be so many times as fast.
    """
    best = max((mode for mode in Mode if mode in allowed and mode in found), key=lambda mode: found[mode])
    return best if now is None or found[best] > times * found[now] else now


def loss_s(single: Costs, costs: Costs, rows: int, signs: Signs) -> float:
    """Seconds that the device loses if one of so many rows drafts and the others do not.

    `single`: costs with one row, `costs`: with all.
    """
    taken_s, gained_s = single.round_s(signs.draft_steps), (signs.accepted + 1) * costs.token / rows
    return max(taken_s - gained_s, _LEAST_LOST * taken_s)
