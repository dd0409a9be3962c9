"""The client's view of an answer: its parts as they arrive, and its usage."""

from dataclasses import dataclass

from twotower.core import BlockEvent, FinishReason, Likelihood, TraceEvent


@dataclass(frozen=True, slots=True)
class Usage:
    """A request's cost so far. `cached_tokens`: tokens of its prompt that a cell had read for another request."""

    prompt_tokens: int
    completion_tokens: int = 0
    num_steps: int = 0
    num_blocks: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_ar_blocks: int = 0
    num_diffusion_blocks: int = 0
    cached_tokens: int = 0

    def plus(self, event: BlockEvent) -> "Usage":
        return Usage(
            self.prompt_tokens,
            self.completion_tokens + len(event.token_ids),
            self.num_steps + event.num_steps,
            self.num_blocks + event.num_blocks,
            self.num_drafted + event.num_drafted,
            self.num_accepted + event.num_accepted,
            self.num_ar_blocks + event.num_ar_blocks,
            self.num_diffusion_blocks + event.num_diffusion_blocks,
            self.cached_tokens + (0 if event.start else event.cached_tokens),  # from the answer's first cell
        )


NOTHING = Usage(0)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Committed tokens with their `cost`, the text that became certain with them, and the usage so far. The last chunk
    has a `finish_reason`. With likelihoods, `offsets` are where the tokens' text begins.
    """

    start: int
    token_ids: tuple[int, ...]
    text: str
    cost: BlockEvent
    usage: Usage
    finish_reason: FinishReason | None = None
    offsets: tuple[int, ...] = ()

    @property
    def likelihoods(self) -> tuple[Likelihood, ...]:
        """One for each token, if requested."""
        return self.cost.likelihoods


Piece = Chunk | TraceEvent  # of a stream
