"""The pieces of an answer as they arrive, including those for `--logprobs` and `--trace`; and their JSON."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from twotower.core import Likelihood, StepEvent, TraceEvent
from twotower.text.token_names import TokenNames
from twotower.text.token_texts import Texts


class Piece(NamedTuple):
    """The next part of an answer. `text`: the text that became certain with these tokens; their ids without a
    tokenizer. `likelihoods`: one for each token, if the request asks for them.
    """

    text: str
    token_ids: Sequence[int]
    likelihoods: Sequence[Likelihood] = ()


def logprobs_json(token_ids: Sequence[int], likelihoods: Sequence[Likelihood], texts: Texts) -> list[dict[str, object]]:
    """An object a token; `token` names it as `logprobs` over HTTP does. `confidence`: in `diffusion` the denoiser's."""
    names, told = TokenNames(texts), list[dict[str, object]]()
    for token, one in zip(token_ids, likelihoods, strict=True):
        top = zip(one.top_token_ids, names.of(one.top_token_ids), one.top_log_probs, strict=True)
        values = _named(token, names.of([token])[0], one.log_prob)
        values["top"] = [_named(*alternative) for alternative in top]
        told.append(values | ({} if one.confidence is None else {"confidence": one.confidence}))
    return told


def _named(token: int, name: str, log_prob: float) -> dict[str, object]:
    return {"token_id": token, "token": name, "log_prob": log_prob}


def trace_json(events: Iterable[TraceEvent], texts: Texts) -> list[dict[str, object]]:
    """An object an event: `step` or `round`, with the fields that the trace has over HTTP."""
    return [_event_json(event, texts) for event in events]


def _event_json(event: TraceEvent, texts: Texts) -> dict[str, object]:
    if isinstance(event, StepEvent):
        step = {name: getattr(event, name) for name in ("start", "size", "step", "positions", "token_ids")}
        return {"step": step | {"texts": texts.of(event.token_ids), "confidence": event.confidence}}
    verdict = {"start": event.start, "draft": event.draft, "draft_texts": texts.of(event.draft)}
    verdict |= {"num_accepted": event.num_accepted, "token_id": event.token_id}
    return {"round": verdict | {"text": "".join(texts.of([event.token_id]))}}
