"""Translates between `twotower.v1` messages and the service's own types.

Lists are passed on without a copy: they may be far too long to be copied before they are counted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from google.protobuf.message import Message

from cluster.faces.grpc.asked import Asked
from cluster.faces.grpc.wire_params import mode_name, params_message
from cluster.runs.answer import Chunk, Piece, Usage
from cluster.runs.echoing import Echoing
from cluster.runs.run import Generating
from cluster.runs.served_model import ServedModel
from twotower.core import (
    COSTS,
    PARAMETERS,
    BlockEvent,
    DecodingParams,
    FinishReason,
    Likelihood,
    StepEvent,
    TraceEvent,
)
from twotower.errors import FieldError, InvalidRequest
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.text.token_texts import TokenTexts


def outside_problems(error: InvalidRequest, kind: type[Message]) -> InvalidRequest:
    """The same problems under the paths of this kind of message."""
    path = _PATHS.get(kind, _path)
    return InvalidRequest([FieldError(path(p.field), p.message) for p in error.problems])


def answer_message(
    asked: Asked, told: Sequence[Generating], decoded: Sequence[Generating], texts: TokenTexts
) -> pb.GenerateResponse:
    """The `told` answers of all decoded ones."""
    first, *others = [_answer(run, asked.rated, texts) for run in told]
    response = pb.GenerateResponse(request_id=asked.shown_id, others=[pb.Choice(**other) for other in others], **first)
    if len(decoded) > 1:
        response.total_usage.CopyFrom(_usage(_together([run.usage for run in decoded])))
    return response


def echo_message(asked: Asked, run: Echoing, texts: TokenTexts) -> pb.GenerateResponse:
    answer, prompt = run.answer, run.prompt
    assert run.finish_reason is not None
    scored = [one for one in run.likelihoods[1 : len(prompt.token_ids)] if one is not None]
    return pb.GenerateResponse(
        request_id=asked.shown_id,
        token_ids=answer.token_ids,
        text=answer.text,
        finished=_finished(answer, answer.usage, run.finish_reason),
        likelihoods=_likelihoods(answer.token_ids, answer.likelihoods, texts),
        prompt=pb.EchoedPrompt(
            token_ids=prompt.token_ids,
            text=prompt.text,
            likelihoods=_likelihoods(prompt.token_ids[1:], scored, texts),
        ),
    )


def _answer(run: Generating, rated: bool, texts: TokenTexts) -> dict[str, Any]:
    assert run.finish_reason is not None
    return {
        "token_ids": run.token_ids,
        "text": run.text,
        "finished": _finished(run, run.usage, run.finish_reason),
        "likelihoods": _likelihoods(run.token_ids, run.likelihoods if rated else (), texts),
    }


def _together(usages: Sequence[Usage]) -> Usage:
    """A prompt counts once, however many answers it has."""
    costs = {name: sum(getattr(usage, name) for usage in usages) for name in COSTS}
    completion, first = sum(usage.completion_tokens for usage in usages), usages[0]
    return Usage(first.prompt_tokens, completion, cached_tokens=first.cached_tokens, **costs)


def piece_messages(
    asked: Asked, place: int, run: Generating, piece: Piece, texts: TokenTexts
) -> Iterator[pb.GenerateStreamResponse]:
    """The events of a piece of the answer at this place."""
    messages = _chunk_messages(run, piece, texts) if isinstance(piece, Chunk) else [_trace_message(piece, texts)]
    for message in messages:
        message.request_id, message.choice = asked.shown_id, place
        yield message


def _trace_message(event: TraceEvent, texts: TokenTexts) -> pb.GenerateStreamResponse:
    if isinstance(event, StepEvent):
        step = pb.Step(
            start=event.start,
            size=event.size,
            step=event.step,
            positions=event.positions,
            token_ids=event.token_ids,
            texts=texts.of(event.token_ids),
            confidence=event.confidence,
        )
        return pb.GenerateStreamResponse(step=step)
    verdict = pb.Round(
        start=event.start,
        draft=event.draft,
        draft_texts=texts.of(event.draft),
        num_accepted=event.num_accepted,
        token_id=event.token_id,
        text="".join(texts.of([event.token_id])),
    )
    return pb.GenerateStreamResponse(round=verdict)


def _chunk_messages(run: Generating, chunk: Chunk, texts: TokenTexts) -> Iterator[pb.GenerateStreamResponse]:
    """The chunk as a `block` event unless it is empty, and `finished` after the last."""
    if chunk.token_ids or chunk.text:
        block = pb.CommittedBlock(
            start=chunk.start,
            token_ids=chunk.token_ids,
            text=chunk.text,
            likelihoods=_likelihoods(chunk.token_ids, chunk.likelihoods, texts),
            **_costs(chunk.cost),
        )
        yield pb.GenerateStreamResponse(block=block)
    if chunk.finish_reason is not None:
        finished = _finished(run, chunk.usage, chunk.finish_reason)
        yield pb.GenerateStreamResponse(finished=finished)


def _likelihoods(
    token_ids: Sequence[int], likelihoods: Sequence[Likelihood], texts: TokenTexts
) -> Iterator[pb.Likelihood]:
    for token, one in zip(token_ids if likelihoods else (), likelihoods, strict=True):
        yield pb.Likelihood(
            log_prob=one.log_prob,
            top_token_ids=one.top_token_ids,
            top_log_probs=one.top_log_probs,
            top_texts=texts.of(one.top_token_ids),
            confidence=one.confidence,
            text="".join(texts.of([token])),
        )


def model_info_message(model: ServedModel) -> pb.GetModelInfoResponse:
    return pb.GetModelInfoResponse(
        model_name=model.name,
        modes=[mode_name(mode) for mode in model.limits.modes],
        vocab_size=model.limits.vocab_size,
        max_sequence_length=model.limits.max_sequence_length,
        has_tokenizer=model.tokenizer is not None,
        defaults=_defaults(model.limits.defaults),
        checkpoint_layout=model.layout,
        checkpoint_fingerprint=model.fingerprint,
        version=model.version,
    )


def _path(field: str) -> str:
    if field.startswith("prompt_token_ids"):
        return field.replace("prompt_token_ids", "token_ids.ids", 1)
    if field.startswith("messages"):
        return _chat_path(field)
    return f"params.{field}" if field.partition("[")[0] in PARAMETERS else field


def _score_path(field: str) -> str:
    """The library has one list of ids; if it is too long, the continuation is to blame."""
    if field.startswith("token_ids"):
        return "continuation"
    name, bracket, place = field.partition("[")
    return f"{name}.ids[{place}" if bracket and name in ("prompt_token_ids", "continuation_token_ids") else field


def _chat_path(field: str) -> str:
    return "chat" if field == "messages" else f"chat.{field}"


def _text_path(field: str) -> str:
    return "text" if field == "prompt" else _path(field)


def _ids_path(field: str) -> str:
    return "token_ids" if field == "prompt" else _path(field)


_PATHS: Mapping[type[Message], Callable[[str], str]] = {
    pb.ScoreRequest: _score_path,
    pb.TokenizeRequest: _text_path,
    pb.DetokenizeRequest: _ids_path,
}


def _finished(run: Generating, usage: Usage, reason: FinishReason) -> pb.Finished:
    return pb.Finished(
        finish_reason=f"FINISH_REASON_{reason.upper()}",
        usage=_usage(usage),
        mode=mode_name(run.request.params.mode),
        seed=run.request.params.seed,
    )


def _usage(usage: Usage) -> pb.Usage:
    read = {"prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens}
    return pb.Usage(completion_tokens=usage.completion_tokens, **read, **_costs(usage))


def _costs(told: BlockEvent | Usage) -> dict[str, int]:
    return {name: getattr(told, name) for name in COSTS}


def _defaults(params: DecodingParams) -> pb.DecodingParams:
    """The defaults without those that are drawn for each request."""
    return params_message({name: getattr(params, name) for name, p in PARAMETERS.items() if not p.drawn})
