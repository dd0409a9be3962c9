"""A request's answer so far, and when it ends: the same in every mode, on either tower."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from twotower.core import BlockEvent, Likelihood, Request
from twotower.decoding.certain_prefix import CertainPrefix
from twotower.decoding.margins import NEAR_TIE
from twotower.decoding.sampling import TokenParams
from twotower.decoding.steering import Matcher, Steered, Steering
from twotower.decoding.stopping import Stopping
from twotower.errors import InvalidRequest, TwoTowerError


class Cost(NamedTuple):
    """The cost of some tokens: the counts of a BlockEvent."""

    num_steps: int = 0
    num_blocks: int = 1
    num_drafted: int = 0
    num_accepted: int = 0
    num_ar_blocks: int = 0
    num_diffusion_blocks: int = 0


@dataclass(slots=True)
class Answer:
    """`generated` counts the answer's tokens. `margin` is the smallest margin of its decisions. `steering`: the
    request's, in modes whose tokens are chosen in the answer's process. `cached_tokens`: tokens of the prompt from the
    prefix cache, until the first event reports them.
    """

    request: Request
    stopping: Stopping
    generated: int
    margin: float = 1.0
    steering: Steering | None = None
    cached_tokens: int = 0

    @classmethod
    def begun(cls, request: Request, eos_token_id: int, matcher: Matcher | None = None) -> Self:
        params, steering = request.params, None
        if params.mode.by_token and params.steers:
            steering = Steering(params, eos_token_id, request.prompt_token_ids, request.committed, matcher)
        return cls(request, Stopping(params, eos_token_id), len(request.committed), steering=steering)

    @property
    def next_token(self) -> TokenParams:
        """How a causal mode samples the next token."""
        steered = None if self.steering is None else Steered(self.steering)
        return TokenParams.of(self.request.params, self.generated, steered)

    def decided(self, margin: float) -> bool:
        """A decision was made with this margin. Returns whether it was a near-tie."""
        self.margin = min(self.margin, margin)
        return margin < NEAR_TIE

    @property
    def room(self) -> int:
        """The number of tokens that the answer may still take."""
        return self.request.params.max_new_tokens - self.generated

    def extend(self, tokens: Sequence[int], cost: Cost, likelihoods: Sequence[Likelihood] = ()) -> BlockEvent:
        """The event with the next tokens, cut at the answer's end."""
        kept, reason = self.stopping.cut(tokens, self.generated)
        margin = None if reason is None else self.margin
        event = BlockEvent(
            self.request.id, self.generated, kept, cost.num_steps, cost.num_blocks, reason, margin,
            cost.num_drafted, cost.num_accepted, cost.num_ar_blocks, cost.num_diffusion_blocks,
            tuple(likelihoods[: len(kept)]), self.cached_tokens,
        )  # fmt: skip
        self.generated += len(kept)
        self.cached_tokens = 0
        if self.steering is not None:
            self.steering.follow(kept)
        return event


def no_way_on(chosen_by: Steering | CertainPrefix | None) -> TwoTowerError | None:
    """The error if the request's own constraint allows no token."""
    fault = None if chosen_by is None else chosen_by.fault
    return None if fault is None else InvalidRequest.of("structured_outputs", f"cannot be continued: {fault}")
