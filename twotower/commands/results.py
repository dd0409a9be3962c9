"""One order through a pair: its events become tokens, text and a result."""

import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass

from twotower.commands.orders import Order
from twotower.core import BlockEvent, FinishReason, Mode
from twotower.decoding.text import TextStream, Tokenizer
from twotower.engine.pair import Pair


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one order. `text` is None where the checkpoint has no tokenizer."""

    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason
    num_steps: int
    num_blocks: int
    mode: Mode
    seconds: float
    seed: int

    def fields(self, order: Order) -> dict[str, object]:
        """As JSON knows it, under the user's own id where there is one."""
        return ({} if order.id is None else {"id": order.id}) | asdict(self)


class _Answer:
    """A growing answer. A stop string ends it at the token that completes the string, its text before the string."""

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...]) -> None:
        self._stream = None if tokenizer is None else TextStream(tokenizer, stop)
        self._one_by_one = bool(stop)
        self.token_ids: list[int] = []
        self.num_steps = self.num_blocks = 0
        self.reason: FinishReason | None = None

    @property
    def text(self) -> str | None:
        return None if self._stream is None else self._stream.text

    def add(self, event: BlockEvent) -> str:
        """Take an event in. Returns what is new to show: certain text, or token ids where there is no tokenizer."""
        self.num_steps += event.num_steps
        self.num_blocks += event.num_blocks
        self.reason = event.finish_reason
        if self._stream is None:
            self.token_ids += event.token_ids
            return "".join(f"{token} " for token in event.token_ids)
        return self._add_text(self._stream, event)

    def _add_text(self, stream: TextStream, event: BlockEvent) -> str:
        tokens = event.token_ids
        parts = [(token,) for token in tokens] if self._one_by_one else [tokens]
        new = ""
        for part in parts:
            new += stream.push(part)
            self.token_ids += part
            if stream.stopped:
                self.reason = FinishReason.STOP
                return new
        return new + stream.push((), last=True) if self.reason is not None else new


async def decode(
    pair: Pair, order: Order, tokenizer: Tokenizer | None, show: Callable[[str, int], None] = lambda new, tokens: None
) -> Result:
    """Decode one order to its end. `show` gets each new piece of text with its number of tokens, as it comes."""
    answer = _Answer(tokenizer, order.stop)
    started = time.perf_counter()
    async with aclosing(pair.generate(order.request)) as events:
        async for event in events:
            already = len(answer.token_ids)
            new = answer.add(event)
            show(new, len(answer.token_ids) - already)
            if answer.reason is not None:
                break
    assert answer.reason is not None, "a pair ends its events with a reason or an error"
    seconds = round(time.perf_counter() - started, 6)
    params = order.request.params
    return Result(
        answer.token_ids,
        answer.text,
        answer.reason,
        answer.num_steps,
        answer.num_blocks,
        params.mode,
        seconds,
        params.seed,
    )
