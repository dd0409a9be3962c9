"""A checkpoint's own expectation: known answers to a fixed sample, their log-probabilities, and bounds for right
answers and tokens a step.

Shipped beside the weights as `expectation.json`. A broken kernel, cache or exchange may not crash anything. It shows
here as wrong answers, fewer tokens a step, or other probabilities. Knows nothing of how the sample is decoded.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from twotower.core import Mode
from twotower.errors import CheckpointError

FILE = "expectation.json"
# Rounding in another dtype, not a broken part: shares of the sample's answers and of its tokens per step. The demo in
# bf16 is 1 % slower; a denoiser whose blocks see themselves only backwards, and answer as well, 9 %.
_ANSWERS_SLACK, _PACE_SLACK = 0.1, 0.06
# Nats a token. The demo in bf16 is 0.01 off; with attention that sees one key too few 0.18, one too many 1.2.
_LIKELIHOOD_SLACK = 0.05


@dataclass(frozen=True, slots=True)
class Known:
    """A prompt and its only right answer, eos included. `mean_log_prob`: the mean log-probability of the tokens of both
    under the context tower, in nats a token. The tower was trained on answers only, so prompt tokens surprise it. But
    confident answers would hardly change with a small fault.
    """

    prompt_token_ids: tuple[int, ...]
    answer_token_ids: tuple[int, ...]
    mean_log_prob: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one prompt in one mode."""

    token_ids: tuple[int, ...]
    num_steps: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """A mode's least number of right answers and range of tokens per step, over the whole sample."""

    mode: Mode
    min_right: int
    min_tokens_per_step: float
    max_tokens_per_step: float

    @classmethod
    def around(cls, mode: Mode, sample: Sequence[Known], outcomes: Sequence[Outcome]) -> "Bounds":
        """Bounds that these outcomes keep with some slack."""
        pace = tokens_per_step(outcomes)
        least = num_right(sample, outcomes) - round(_ANSWERS_SLACK * len(sample))
        return cls(mode, max(least, 0), round(pace * (1 - _PACE_SLACK), 3), round(pace * (1 + _PACE_SLACK), 3))

    def shortfall(self, sample: Sequence[Known], outcomes: Sequence[Outcome]) -> str | None:
        """The values out of bounds, in words; None if there are none."""
        right, pace = num_right(sample, outcomes), tokens_per_step(outcomes)
        if right < self.min_right:
            return f"got {right} of {len(sample)} known answers right, wanted at least {self.min_right}"
        if not self.min_tokens_per_step <= pace <= self.max_tokens_per_step:
            wanted = f"{self.min_tokens_per_step:.2f} to {self.max_tokens_per_step:.2f}"
            return f"got {pace:.2f} tokens per step on known prompts, wanted {wanted}"
        return None


@dataclass(frozen=True, slots=True)
class Expectation:
    """The sample, and the bounds of each mode that has any."""

    sample: tuple[Known, ...]
    bounds: tuple[Bounds, ...]

    @classmethod
    def load(cls, directory: Path | str) -> "Expectation | None":
        """The expectation beside a checkpoint's weights; None if there is none. Raises CheckpointError."""
        path = Path(directory) / FILE
        try:
            found = _read(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not an expectation as this version has it ({error}); a checkpoint may do without one"
            ) from error
        if not found.sample:
            raise CheckpointError(f"{path}: got an empty sample, wanted known answers")
        return found

    def misread(self, mean_log_probs: Sequence[float]) -> str | None:
        """The fault in the log-probabilities of the sample's texts, in words; None if there is none."""
        pairs = zip(self.sample, mean_log_probs, strict=True)
        off = statistics.mean(abs(known.mean_log_prob - got) for known, got in pairs)
        if not off <= _LIKELIHOOD_SLACK:
            return f"got likelihoods of known texts {off:.3f} nats a token off, wanted at most {_LIKELIHOOD_SLACK}"
        return None

    def save(self, directory: Path | str) -> None:
        """Write it beside the weights."""
        (Path(directory) / FILE).write_text(json.dumps([["Expectation", asdict(self)]], separators=(",", ":")) + "\n")


def num_right(sample: Sequence[Known], outcomes: Sequence[Outcome]) -> int:
    """How many outcomes are the known answers, token for token."""
    return sum(known.answer_token_ids == got.token_ids for known, got in zip(sample, outcomes, strict=True))


def tokens_per_step(outcomes: Sequence[Outcome]) -> float:
    """Tokens up to eos per pass of the deciding tower."""
    return sum(len(got.token_ids) for got in outcomes) / max(1, sum(got.num_steps for got in outcomes))


def _read(data: bytes) -> Expectation:
    """Raises ValueError (msgspec.ValidationError is one)."""
    import msgspec

    [(_, found)] = msgspec.json.decode(data, type=tuple[tuple[Literal["Expectation"], Expectation]])
    return found
