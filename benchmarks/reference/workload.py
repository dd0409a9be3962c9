"""What is asked: the same greedy requests of every path. Prompts from the demo corpus, or random token ids."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from random import Random

import twotower.demo
from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.model.checkpoint import Checkpoint

DEMO = Path(twotower.demo.__file__).parent / "checkpoint"
_FIRST_ORDINARY_ID = 4  # after pad, bos, eos and mask
_RANDOM_LENGTHS = (16, 128)


@dataclass(frozen=True)
class Workload:
    """Endless prompts for one checkpoint, and how each is decoded."""

    checkpoint: Checkpoint
    max_new_tokens: int
    confidence_threshold: float
    ignore_eos: bool
    seed: int = 0

    @property
    def is_demo(self) -> bool:
        return self.checkpoint.directory == DEMO

    @property
    def prompts(self) -> str:
        """Where the prompts come from, in words."""
        if self.is_demo:
            return "held-out side of the demo corpus, the families the checkpoint was trained on"
        return f"random token ids, {_RANDOM_LENGTHS[0]} to {_RANDOM_LENGTHS[1]} of them"

    def requests(self, mode: Mode, number: int, name: str) -> list[Request]:
        """The first `number` prompts as requests; `name` makes their ids unique."""
        params = DecodingParams(
            mode=mode,
            max_new_tokens=self.max_new_tokens,
            confidence_threshold=self.confidence_threshold,
            ignore_eos=self.ignore_eos,
        )
        prompts = islice(self._prompts(), number)
        return [Request(RequestId(f"{name}-{i}"), prompt, params) for i, prompt in enumerate(prompts)]

    def _prompts(self) -> Iterator[tuple[int, ...]]:
        return _demo_prompts(self.seed) if self.is_demo else _random_prompts(self.seed, self.checkpoint)


def _demo_prompts(seed: int) -> Iterator[tuple[int, ...]]:
    from twotower.demo.corpus import families_of, stream
    from twotower.demo.tokenizer import encode_prompt, load_tokenizer

    tokenizer = load_tokenizer(DEMO)
    for instance in stream("test", seed, known=families_of(DEMO)):
        yield tuple(encode_prompt(tokenizer, instance.prompt))


def _random_prompts(seed: int, checkpoint: Checkpoint) -> Iterator[tuple[int, ...]]:
    rng = Random(seed)
    for _ in count():
        length = rng.randint(*_RANDOM_LENGTHS)
        yield tuple(rng.randrange(_FIRST_ORDINARY_ID, checkpoint.config.vocab_size) for _ in range(length))
