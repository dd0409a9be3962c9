"""Between `twotower.v1` messages and the service's own words.

Lists are handed on as the message has them: they may be far too long to be copied before they are counted.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from google.protobuf.message import Message

from cluster.faces.grpc.wire_params import given_in, mode_name, params_message
from cluster.runs.answer import Chunk, Piece, Usage
from cluster.runs.generation import Ask, ScoreAsk
from cluster.runs.run import Generating, Scoring
from cluster.runs.served_model import ServedModel
from twotower.core import (
    COSTS,
    PARAMETERS,
    BlockEvent,
    DecodingParams,
    FinishReason,
    Likelihood,
    ScoreEvent,
    StepEvent,
    TraceEvent,
)
from twotower.errors import FieldError, InvalidRequest
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.text.token_texts import TokenTexts


def ask_of(request: pb.GenerateRequest, label: str, own_id: str) -> Ask:
    """What the client asked for; only the fields it gave."""
    logprobs = request.logprobs if request.HasField("logprobs") else None
    return Ask(
        _prompt(request),
        given_in(request.params),
        request.stop,
        label,
        request.priority,
        own_id,
        request.trace,
        logprobs,
    )


def score_ask_of(request: pb.ScoreRequest, label: str, own_id: str) -> ScoreAsk:
    """What the client wants scored. Raises InvalidRequest where it leaves out a part."""
    parts = {name: _score_part(request, name) for name in ("prompt", "continuation")}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise InvalidRequest([FieldError(n, f"missing, wanted {n}_text or {n}_token_ids") for n in missing])
    prompt, continuation = (part for part in parts.values() if part is not None)
    return ScoreAsk(prompt, continuation, label, request.priority, own_id)


def outside_problems(error: InvalidRequest, kind: type[Message]) -> InvalidRequest:
    """The same problems under the paths of this kind of message."""
    path = _PATHS.get(kind, _path)
    return InvalidRequest([FieldError(path(p.field), p.message) for p in error.problems])


def answer_message(run: Generating, texts: TokenTexts) -> pb.GenerateResponse:
    assert run.finish_reason is not None
    return pb.GenerateResponse(
        request_id=run.shown_id,
        token_ids=run.token_ids,
        text=run.text,
        finished=_finished(run, run.usage, run.finish_reason),
        likelihoods=_likelihoods(run.token_ids, run.likelihoods, texts),
    )


def piece_messages(run: Generating, piece: Piece, texts: TokenTexts) -> Iterator[pb.GenerateStreamResponse]:
    """A piece of a stream as events."""
    if isinstance(piece, Chunk):
        yield from _chunk_messages(run, piece, texts)
    else:
        yield _trace_message(run, piece, texts)


def _trace_message(run: Generating, event: TraceEvent, texts: TokenTexts) -> pb.GenerateStreamResponse:
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
        return pb.GenerateStreamResponse(request_id=run.shown_id, step=step)
    verdict = pb.Round(
        start=event.start,
        draft=event.draft,
        draft_texts=texts.of(event.draft),
        num_accepted=event.num_accepted,
        token_id=event.token_id,
        text="".join(texts.of([event.token_id])),
    )
    return pb.GenerateStreamResponse(request_id=run.shown_id, round=verdict)


def _chunk_messages(run: Generating, chunk: Chunk, texts: TokenTexts) -> Iterator[pb.GenerateStreamResponse]:
    """The chunk as a `block` event where it holds anything, and `finished` after the last."""
    request_id = run.shown_id
    if chunk.token_ids or chunk.text:
        block = pb.CommittedBlock(
            start=chunk.start,
            token_ids=chunk.token_ids,
            text=chunk.text,
            likelihoods=_likelihoods(chunk.token_ids, chunk.likelihoods, texts),
            **_costs(chunk.cost),
        )
        yield pb.GenerateStreamResponse(request_id=request_id, block=block)
    if chunk.finish_reason is not None:
        finished = _finished(run, chunk.usage, chunk.finish_reason)
        yield pb.GenerateStreamResponse(request_id=request_id, finished=finished)


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


def score_message(run: Scoring, event: ScoreEvent) -> pb.ScoreResponse:
    request = run.request
    return pb.ScoreResponse(
        request_id=run.shown_id,
        token_ids=request.token_ids[request.start :],
        log_probs=event.log_probs,
        is_greedy=event.is_greedy,
        sum_log_prob=math.fsum(event.log_probs),
        prompt_tokens=request.start,
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


def _prompt(request: pb.GenerateRequest) -> str | Sequence[object]:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "token_ids":
            return request.token_ids.ids
    raise InvalidRequest.of("prompt", "missing, wanted text or token_ids")


def _score_part(request: pb.ScoreRequest, name: str) -> str | Sequence[object] | None:
    field = request.WhichOneof(name)
    if field is None:
        return None
    given = getattr(request, field)
    return given.ids if isinstance(given, pb.TokenIds) else str(given)


def _path(field: str) -> str:
    if field.startswith("prompt_token_ids"):
        return field.replace("prompt_token_ids", "token_ids.ids", 1)
    return f"params.{field}" if field.partition("[")[0] in PARAMETERS else field


def _score_path(field: str) -> str:
    """The library knows one list of ids; what is too long about it is the continuation."""
    name, bracket, place = field.partition("[")
    if name == "token_ids":
        return "continuation"
    return f"{name}.ids[{place}" if bracket else field


def _text_path(field: str) -> str:
    return "text" if field == "prompt" else field


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
        usage=pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            **_costs(usage),
        ),
        mode=mode_name(run.request.params.mode),
        seed=run.request.params.seed,
    )


def _costs(told: BlockEvent | Usage) -> dict[str, int]:
    return {name: getattr(told, name) for name in COSTS}


def _defaults(params: DecodingParams) -> pb.DecodingParams:
    """Defaults, less what is drawn for each request."""
    return params_message({name: getattr(params, name) for name, p in PARAMETERS.items() if not p.drawn})
