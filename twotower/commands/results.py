"""One order through a pair: its events become tokens, text and a result."""

import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, fields

from twotower.commands.orders import Order
from twotower.commands.told import Piece, logprobs_json, trace_json
from twotower.core import COSTS, BlockEvent, FinishReason, Likelihood, Mode, ScoreEvent, TraceEvent
from twotower.engine.pair import Pair
from twotower.text.answer_text import AnswerText
from twotower.text.token_texts import Texts
from twotower.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one order. `text` is None if the checkpoint has no tokenizer."""

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
    likelihoods: list[Likelihood]
    trace: list[TraceEvent]

    def fields(self, order: Order, texts: Texts) -> dict[str, object]:
        """The JSON object of the result, with the user's own id if there is one."""
        told: dict[str, object] = {} if order.id is None else {"id": order.id}
        told |= {field.name: getattr(self, field.name) for field in fields(self)[:-2]}
        if order.request.logprobs is not None:
            told["logprobs"] = logprobs_json(self.token_ids, self.likelihoods, texts)
        if order.request.trace:
            told["trace"] = trace_json(self.trace, texts)
        return told


async def decode(
    pair: Pair,
    order: Order,
    tokenizer: Tokenizer | None,
    hear: Callable[[Piece | TraceEvent], None] = lambda told: None,
) -> Result:
    """Decode one order to its end. `hear` gets each piece of the answer and of its trace as it arrives."""
    answer = AnswerText(tokenizer, order.stop, min_tokens=order.request.params.min_tokens)
    costs, likelihoods, trace = dict.fromkeys(COSTS, 0), list[Likelihood](), list[TraceEvent]()
    reason: FinishReason | None = None
    started = time.perf_counter()
    async with aclosing(pair.events(order.request)) as events:
        async for event in events:
            assert not isinstance(event, ScoreEvent)
            if not isinstance(event, BlockEvent):
                trace.append(event)
                hear(event)
                continue
            taken, new = answer.push(event.token_ids, last=event.finish_reason is not None)
            first = event.first(len(taken))
            costs = {name: count + getattr(first, name) for name, count in costs.items()}
            likelihoods += first.likelihoods
            hear(Piece("".join(f"{token} " for token in taken) if tokenizer is None else new, taken, first.likelihoods))
            reason = FinishReason.STOP if answer.stopped else event.finish_reason
            if reason is not None:
                break
    assert reason is not None, "a pair ends its events with a reason or an error"
    seconds = round(time.perf_counter() - started, 6)
    params = order.request.params
    how = {"mode": params.mode, "seconds": seconds, "seed": params.seed, "likelihoods": likelihoods, "trace": trace}
    return Result(answer.token_ids, answer.text, reason, **costs, **how)  # type: ignore[arg-type]
