"""The responses of /v1/completions, written."""

import asyncio
from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json

from cluster.faces.error_codes import Failure
from cluster.faces.error_shape import error_shape
from cluster.faces.http.completion_models import Choice, Completion, CompletionAndUsage, LogProbs
from cluster.faces.http.completion_models import Usage as UsageBody
from cluster.faces.http.completions import CompletionCall
from cluster.faces.http.log_probs import log_probs, whole_log_probs
from cluster.runs.answer import Chunk, Usage
from cluster.runs.echoing import Echoing
from cluster.runs.run import Generating
from twotower.core import COSTS, FinishReason, StepEvent, TraceEvent
from twotower.text.token_names import TokenNames
from twotower.text.token_texts import TokenTexts

_NO_CHOICES = b'"choices":[]'


async def whole_body(
    call: CompletionCall, model: str, created: int, runs: Sequence[Generating | Echoing], names: TokenNames
) -> bytes:
    """The response of a call that does not stream. It may be very long: others have their turn between its choices."""
    choices = []
    answers = [run.answer if isinstance(run, Echoing) else run for run in runs]
    for index, (run, answer) in enumerate(zip(runs, answers, strict=True)):
        told = None if answer.request.logprobs is None else await whole_log_probs(run, names)
        choices.append(encoded(_choice(index, answer, run.text, run.token_ids, run.finish_reason, told)))
        await asyncio.sleep(0)
    around = encoded(_completion(call, model, created, [], [answer.usage for answer in answers]))
    before, after = around.split(_NO_CHOICES, 1)
    return b"".join([before, b'"choices":[', b",".join(choices), b"]", after])


def chunk_body(
    call: CompletionCall,
    model: str,
    created: int,
    index: int,
    run: Generating,
    chunk: Chunk,
    usages: Sequence[Usage] | None,
    names: TokenNames,
) -> Completion:
    """One event of a stream; `usages`: of all its prompts so far, where every event has them."""
    asked = run.request.logprobs is not None
    told = log_probs(chunk.token_ids, chunk.likelihoods, chunk.offsets, names) if asked else None
    choice = _choice(index, run, chunk.text, chunk.token_ids, chunk.finish_reason, told)
    return _completion(call, model, created, [choice], usages)


def usage_event(call: CompletionCall, model: str, created: int, usages: Sequence[Usage]) -> Completion:
    """The event before [DONE] where stream_options.include_usage asks for it."""
    return _completion(call, model, created, [], usages)


def trace_body(call: CompletionCall, index: int, event: TraceEvent, texts: TokenTexts) -> dict[str, object]:
    """A `twotower.trace` event: without choices, since OpenAI's SDKs read any event as a completion."""
    about = {"id": call.id, "request_id": call.label or call.id, "object": "twotower.trace", "choices": []}
    return {**about, "index": index, **_traced(event, texts)}


def _traced(event: TraceEvent, texts: TokenTexts) -> dict[str, object]:
    if isinstance(event, StepEvent):
        step = {"start": event.start, "size": event.size, "step": event.step, "positions": event.positions}
        tokens = {"token_ids": event.token_ids, "texts": texts.of(event.token_ids), "confidence": event.confidence}
        return {"step": {**step, **tokens}}
    draft = {"start": event.start, "draft": event.draft, "draft_texts": texts.of(event.draft)}
    written = {"token_id": event.token_id, "text": "".join(texts.of([event.token_id]))}
    return {"round": {**draft, "num_accepted": event.num_accepted, **written}}


def encoded(body: object) -> bytes:
    """JSON in UTF-8 without spaces."""
    return to_json(body)


def error_body(failure: Failure) -> dict[str, object]:
    """`param` is the first field at fault."""
    param = failure.problems[0].field if failure.problems else None
    return error_shape(failure.message, failure.code.type, param, failure.code.code)


def _completion(
    call: CompletionCall, model: str, created: int, choices: list[Choice], usages: Sequence[Usage] | None
) -> Completion:
    own: dict[str, Any] = {
        "id": call.id,
        "request_id": call.label or call.id,
        "created": created,
        "model": model,
        "choices": choices,
    }
    return Completion(**own) if usages is None else CompletionAndUsage(**own, usage=_together(usages))


def _together(usages: Sequence[Usage]) -> UsageBody:
    prompt, completion = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    return UsageBody(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        **{name: sum(getattr(usage, name) for usage in usages) for name in COSTS},
    )


def _choice(
    index: int,
    run: Generating,
    text: str,
    token_ids: Sequence[int],
    finish_reason: FinishReason | None,
    logprobs: LogProbs | None,
) -> Choice:
    return Choice(
        index=index,
        text=text,
        token_ids=list(token_ids),
        logprobs=logprobs,
        finish_reason=finish_reason,
        seed=run.request.params.seed,
    )
