"""How long prompts and answers are, and how many steps a block takes."""

from bisect import bisect_right
from dataclasses import dataclass
from random import Random

BLOCK = 16
_SHARES = (*(place / 20 for place in range(20)), 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution by its values at each twentieth, at 99 % and at its end; straight between them."""

    values: tuple[int, ...]

    def at(self, share: float) -> int:
        """`share`: 0 to 1."""
        place = min(bisect_right(_SHARES, share), len(_SHARES) - 1)
        low, high = _SHARES[place - 1], _SHARES[place]
        return round(
            self.values[place - 1] + (self.values[place] - self.values[place - 1]) * (share - low) / (high - low)
        )

    def draw(self, random: Random) -> int:
        return max(1, self.at(random.random()))


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of prompts and of answers, drawn apart. `source`: whose."""

    prompt: Quantiles
    answer: Quantiles
    source: str


_AZURE = "Azure LLM inference trace 2023, {} ({} requests; CC-BY; Patel et al., Splitwise, ISCA 2024), by its quantiles"
LENGTHS = {
    "conversation": Lengths(
        Quantiles((
            2, 181, 207, 372, 387, 396, 403, 414, 703, 984, 1020, 1045, 1071, 1097, 1130, 1189, 1315, 1876, 2735, 4083,
            4142, 14050,
        )),
        Quantiles((
            7, 41, 54, 67, 77, 85, 91, 96, 103, 113, 129, 151, 177, 217, 384, 395, 400, 411, 424, 451, 601, 1000,
        )),
        _AZURE.format("conversation", "19,366"),
    ),
    "code": Lengths(
        Quantiles((
            3, 75, 147, 232, 386, 578, 770, 938, 1075, 1261, 1469, 1690, 1909, 2164, 2433, 2745, 3192, 3919, 5186, 7302,
            7436, 7437,
        )),
        Quantiles((6, 6, 7, 7, 8, 9, 9, 10, 11, 12, 13, 14, 16, 18, 20, 24, 29, 39, 55, 90, 252, 1899)),
        _AZURE.format("code", "8,819"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: tokens of its prompt, tokens of its answer, and the denoiser's steps for each block of that."""

    prompt: int
    answer: int
    steps: tuple[int, ...]


def blocks_of(answer: int, width: int = BLOCK) -> int:
    return -(-answer // width)


def steps_of(blocks: int, mean: float, random: Random, most: int = BLOCK) -> tuple[int, ...]:
    """Steps of each block: at least one, at most `most`, binomial between, `mean` on average."""
    share = (min(max(mean, 1.0), most) - 1) / (most - 1)
    return tuple(1 + sum(random.random() < share for _ in range(most - 1)) for _ in range(blocks))


def draw(lengths: Lengths, tokens_per_step: float, longest_prompt: int, longest_answer: int, random: Random) -> Asked:
    """One that fits. Longer ones are cut, as a service would have refused them."""
    prompt = min(lengths.prompt.draw(random), longest_prompt)
    answer = min(lengths.answer.draw(random), longest_answer)
    return Asked(prompt, answer, steps_of(blocks_of(answer), BLOCK / tokens_per_step, random))


def spread(steps: int, blocks: int) -> tuple[int, ...]:
    """So many steps in all, over so many blocks as evenly as it goes; at least one each."""
    each, over = divmod(max(steps, blocks), blocks)
    return tuple(each + (place < over) for place in range(blocks))
