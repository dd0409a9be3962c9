"""One order through a pair: its events become tokens, text and a result."""

import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass

from twotower.commands.orders import Order
from twotower.core import COSTS, FinishReason, Mode
from twotower.engine.pair import Pair
from twotower.text.answer_text import AnswerText
from twotower.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one order. `text` is None where the checkpoint has no tokenizer."""

    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason
    num_steps: int
    num_blocks: int
    num_drafted: int
    num_accepted: int
    num_ar_blocks: int
    num_diffusion_blocks: int
    mode: Mode
    seconds: float
    seed: int

    def fields(self, order: Order) -> dict[str, object]:
        """As JSON knows it, under the user's own id where there is one."""
        return ({} if order.id is None else {"id": order.id}) | asdict(self)


async def decode(
    pair: Pair, order: Order, tokenizer: Tokenizer | None, show: Callable[[str, int], None] = lambda new, tokens: None
) -> Result:
    """Decode one order to its end. `show` gets each new piece of text (token ids where there is no tokenizer) with its
    number of tokens, as it comes.
    """
    answer = AnswerText(tokenizer, order.stop, min_tokens=order.request.params.min_tokens)
    costs = dict.fromkeys(COSTS, 0)
    reason: FinishReason | None = None
    started = time.perf_counter()
    async with aclosing(pair.generate(order.request)) as events:
        async for event in events:
            taken, new = answer.push(event.token_ids, last=event.finish_reason is not None)
            cost = event.first(len(taken))
            costs = {name: count + getattr(cost, name) for name, count in costs.items()}
            show("".join(f"{token} " for token in taken) if tokenizer is None else new, len(taken))
            reason = FinishReason.STOP if answer.stopped else event.finish_reason
            if reason is not None:
                break
    assert reason is not None, "a pair ends its events with a reason or an error"
    seconds = round(time.perf_counter() - started, 6)
    params = order.request.params
    how = {"mode": params.mode, "seconds": seconds, "seed": params.seed}
    return Result(answer.token_ids, answer.text, reason, **costs, **how)  # type: ignore[arg-type]
