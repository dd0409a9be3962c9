"""What to measure and what is asked. Sizes for an idle machine, and small ones for a first look."""

import statistics
from dataclasses import dataclass
from itertools import islice
from random import Random

from benchmarks.reference.workload import DEMO, Workload
from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.engine.settings import EngineSettings
from twotower.model.checkpoint import Checkpoint

LONG_PROMPT = 4000


@dataclass(frozen=True, slots=True)
class Variant:
    """A way of decoding. The threshold decides how many steps a block takes."""

    name: str
    mode: Mode
    threshold: float = 0.8


@dataclass(frozen=True)
class Plan:
    """Numbers of everything. `prompts` different ones go round, so every run has the same tokens per step."""

    checkpoint: Checkpoint
    concurrency: tuple[int, ...] = (1, 4, 16)
    thresholds: tuple[float, ...] = (0.8, 1.0)
    max_new_tokens: int = 128
    prompts: int = 32
    per_client: int = 6
    rounds: int = 3
    pass_s: float = 0.6
    watched_per_client: int = 3
    arrivals_per_client: int = 8
    long_prompt: int = LONG_PROMPT
    profile_s: int = 8
    threads: int = 1
    served: bool = True
    capture: str = "auto"
    seed: int = 0

    @property
    def variants(self) -> tuple[Variant, ...]:
        diffusion = (Variant(f"diffusion γ {g:g}", Mode.DIFFUSION, g) for g in self.thresholds)
        return (*diffusion, Variant("ar", Mode.AR))

    @property
    def most(self) -> int:
        return max(self.concurrency)

    @property
    def name(self) -> str:
        return "demo" if self.checkpoint.directory == DEMO else self.checkpoint.directory.name

    @property
    def running_beside(self) -> int:
        """Requests under way when the long prompt comes."""
        return max(1, self.most // 2)

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the bare passes."""
        between = [r for r in (1, 2, 4, 8, 16, 32) if r <= self.most]
        return tuple(sorted({*between, *self.concurrency}))

    @property
    def engine(self) -> EngineSettings:
        """Room for the long prompt beside everybody else. No prefixes are kept: every round reads its prompts anew."""
        longest = self.long_prompt + self.max_new_tokens
        room = (self.most + 1) * 512 + longest
        return EngineSettings(
            max_sequences=self.most + 2,
            max_sequence_length=longest,
            cache_tokens=room,
            max_queued_requests=4 * self.most,
            capture=self.capture,
            prefix_cache_bytes=0,
        )

    def requests_at(self, concurrency: int) -> int:
        """Whole rounds of the prompts."""
        return -(-self.per_client * concurrency // self.prompts) * self.prompts


class Questions:
    """Requests over the plan's prompts."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        workload = Workload(plan.checkpoint, plan.max_new_tokens, 0.8, ignore_eos=True, seed=plan.seed)
        self.where_from = workload.prompts
        self.prompts = [r.prompt_token_ids for r in workload.requests(Mode.AR, plan.prompts, "prompt")]

    @property
    def median_prompt(self) -> int:
        return int(statistics.median(len(prompt) for prompt in self.prompts))

    @property
    def cached(self) -> int:
        """Tokens a sequence has read halfway through its answer."""
        return self.median_prompt + self._plan.max_new_tokens // 2

    def rows(self, count: int) -> list[tuple[int, ...]]:
        return [self.prompts[i % len(self.prompts)] for i in range(count)]

    def requests(self, variant: Variant, count: int, name: str, max_new_tokens: int = 0) -> list[Request]:
        params = self._params(variant, max_new_tokens or self._plan.max_new_tokens)
        prompts = self.rows(count)
        return [Request(RequestId(f"{name}-{i}"), prompt, params) for i, prompt in enumerate(prompts)]

    def mixed(self, count: int, name: str) -> list[Request]:
        """All variants, in different lengths, drawn by the plan's seed."""
        rng = Random(self._plan.seed)
        longest = self._plan.max_new_tokens
        lengths = sorted({max(16, longest // share) for share in (4, 2, 1)})
        requests = []
        for i, prompt in enumerate(self.rows(count)):
            params = self._params(rng.choice(self._plan.variants), rng.choice(lengths))
            requests.append(Request(RequestId(f"{name}-{i}"), prompt, params))
        return requests

    def long(self, variant: Variant, name: str) -> Request:
        """One request with the long prompt: all prompts one after the other, again and again."""
        tokens = [token for prompt in self.prompts for token in prompt]
        wanted = self._plan.long_prompt
        prompt = tuple(islice((tokens * (wanted // len(tokens) + 1)), wanted))
        return Request(RequestId(name), prompt, self._params(variant, 16))

    def _params(self, variant: Variant, max_new_tokens: int) -> DecodingParams:
        return DecodingParams(
            mode=variant.mode,
            max_new_tokens=max_new_tokens,
            confidence_threshold=variant.threshold,
            ignore_eos=True,
        )
