"""What a client gets of an answer: its parts as they come, and what it has cost."""

from dataclasses import dataclass

from twotower.core import BlockEvent, FinishReason


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request has cost so far."""

    prompt_tokens: int
    completion_tokens: int = 0
    num_steps: int = 0
    num_blocks: int = 0

    def plus(self, event: BlockEvent) -> "Usage":
        return Usage(
            self.prompt_tokens,
            self.completion_tokens + len(event.token_ids),
            self.num_steps + event.num_steps,
            self.num_blocks + event.num_blocks,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Committed tokens, the text that became certain with them, the usage so far. The last has a `finish_reason`."""

    start: int
    token_ids: tuple[int, ...]
    text: str
    num_steps: int
    num_blocks: int
    usage: Usage
    finish_reason: FinishReason | None = None
