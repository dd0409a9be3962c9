"""Between `twotower.v1` messages and the service's own words.

Lists are handed on as the message has them: they may be far too long to be copied before they are counted.
"""

import math
from collections.abc import Iterator, Sequence

from google.protobuf.message import Message

from cluster.generation import Ask, ScoreAsk
from cluster.runs.answer import Chunk, Usage
from cluster.runs.run import Generating, Scoring
from cluster.served_model import ServedModel
from twotower.core import DecodingParams, FinishReason, Mode, ScoreEvent
from twotower.errors import FieldError, InvalidRequest
from twotower.pb.twotower.v1 import generation_pb2 as pb

_SCALARS = (
    "max_new_tokens block_size steps_per_block confidence_threshold temperature top_k top_p seed ignore_eos"
).split()
_PARAMS = {*_SCALARS, "mode", "stop_token_ids"}


def ask_of(request: pb.GenerateRequest, label: str) -> Ask:
    """What the client asked for; only the fields it gave."""
    params = {name: getattr(request.params, name) for name in _SCALARS if request.params.HasField(name)}
    if request.params.mode:
        params["mode"] = _mode_word(request.params.mode)
    if request.params.stop_token_ids:
        params["stop_token_ids"] = request.params.stop_token_ids
    return Ask(_prompt(request), params, request.stop, label, request.priority)


def score_ask_of(request: pb.ScoreRequest, label: str) -> ScoreAsk:
    """What the client wants scored. Raises InvalidRequest where it leaves out a part."""
    parts = {name: _score_part(request, name) for name in ("prompt", "continuation")}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise InvalidRequest([FieldError(n, f"missing, wanted {n}_text or {n}_token_ids") for n in missing])
    prompt, continuation = (part for part in parts.values() if part is not None)
    return ScoreAsk(prompt, continuation, label, request.priority)


def outside_problems(error: InvalidRequest, kind: type[Message]) -> InvalidRequest:
    """The same problems under the paths of this kind of message."""
    path = _score_path if kind is pb.ScoreRequest else _path
    return InvalidRequest([FieldError(path(p.field), p.message) for p in error.problems])


def answer_message(run: Generating) -> pb.GenerateResponse:
    assert run.finish_reason is not None
    return pb.GenerateResponse(
        request_id=run.shown_id,
        token_ids=run.token_ids,
        text=run.text,
        finished=_finished(run, run.usage, run.finish_reason),
    )


def chunk_messages(run: Generating, chunk: Chunk) -> Iterator[pb.GenerateStreamResponse]:
    """The chunk as a `block` event where it holds anything, and `finished` after the last."""
    request_id = run.shown_id
    if chunk.token_ids or chunk.text:
        block = pb.CommittedBlock(
            start=chunk.start,
            token_ids=chunk.token_ids,
            text=chunk.text,
            num_steps=chunk.num_steps,
            num_blocks=chunk.num_blocks,
        )
        yield pb.GenerateStreamResponse(request_id=request_id, block=block)
    if chunk.finish_reason is not None:
        finished = _finished(run, chunk.usage, chunk.finish_reason)
        yield pb.GenerateStreamResponse(request_id=request_id, finished=finished)


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
        modes=[_mode_name(mode) for mode in model.limits.modes],
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
    return f"params.{field}" if field.partition("[")[0] in _PARAMS else field


def _score_path(field: str) -> str:
    """The library knows one list of ids; what is too long about it is the continuation."""
    name, bracket, place = field.partition("[")
    if name == "token_ids":
        return "continuation"
    return f"{name}.ids[{place}" if bracket else field


def _mode_word(number: int) -> str | int:
    """The library's word for a mode; a number this server has no word for stays a number, and is refused there."""
    name = pb.Mode.Name(number) if number in pb.Mode.values() else None
    return number if name is None else name.removeprefix("MODE_").lower()


def _mode_name(mode: Mode) -> str:
    """The wire's name; messages take names for enums."""
    return f"MODE_{mode.upper()}"


def _finished(run: Generating, usage: Usage, reason: FinishReason) -> pb.Finished:
    return pb.Finished(
        finish_reason=f"FINISH_REASON_{reason.upper()}",
        usage=pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            num_steps=usage.num_steps,
            num_blocks=usage.num_blocks,
        ),
        mode=_mode_name(run.request.params.mode),
        seed=run.request.params.seed,
    )


def _defaults(params: DecodingParams) -> pb.DecodingParams:
    """Defaults, less the seed, which is drawn for each request."""
    scalars = {name: getattr(params, name) for name in _SCALARS if name != "seed"}
    return pb.DecodingParams(mode=_mode_name(params.mode), stop_token_ids=params.stop_token_ids, **scalars)
