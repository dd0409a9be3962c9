"""The gRPC face: writes calls as messages, reads answers from messages, errors from statuses. Opens no channel."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar, cast

import grpc
from google.rpc import error_details_pb2, status_pb2

from twotower_client.answers import (
    Alternative,
    Answer,
    Block,
    Event,
    Finished,
    FinishReason,
    Likelihood,
    ModelInfo,
    Round,
    Score,
    Step,
    Usage,
)
from twotower_client.asking import Ask, Chat, ScoreAsk
from twotower_client.errors import Details, FieldViolation, InvalidRequest, ServiceError, error_of
from twotower_client.wire import messages as pb

_SERVICE = "twotower.v1.GenerationService"
_HEALTH = "/grpc.health.v1.Health/Check"
_SERVICE_ID = "x-twotower-id"
_STATUS = "grpc-status-details-bin"
_ENUMS: dict[str, Any] = {"mode": pb.Mode, "floor": pb.Floor}
# A GenerateRequest's fields other than prompt and parameters, under an Ask's names.
_BESIDE = tuple(one.name for one in fields(Ask) if one.name not in ("prompt", "params"))
_SERVING = b"\x08\x01"

Told = TypeVar("Told")


@dataclass(frozen=True, slots=True)
class Rpc(Generic[Told]):
    """A call to make: its method, its message as bytes, and the reader of the answer's bytes, which gets the service's
    id of the request.
    """

    path: str
    message: bytes
    read: Callable[[bytes, str], Told]
    request_id: str = ""


def generate_rpc(ask: Ask) -> Rpc[Answer]:
    """The call for a whole answer. Raises InvalidRequest for an ask that cannot be sent."""
    ask.check_whole()

    def read(data: bytes, service_id: str) -> Answer:
        told = pb.GenerateResponse.FromString(data)
        usage = _usage(told.total_usage if told.HasField("total_usage") else told.finished.usage)
        first, *others = (_answer(one, usage, ask.request_id, service_id) for one in (told, *told.others))
        whole = replace(first, others=tuple(others))
        return _echoed(told.prompt, whole, ask.logprobs is not None) if told.HasField("prompt") else whole

    return Rpc(f"/{_SERVICE}/Generate", _generate_message(ask), read, ask.request_id)


def stream_rpc(ask: Ask) -> Rpc[Event]:
    """The call for a stream. Raises InvalidRequest for an ask that cannot be sent."""
    ask.check_streams()
    return Rpc(f"/{_SERVICE}/GenerateStream", _generate_message(ask), _event, ask.request_id)


def score_rpc(ask: ScoreAsk) -> Rpc[tuple[Score, ...]]:
    first, *others = ask.continuations
    parts = {**_scored_part("prompt", ask.prompt), **_scored_part("continuation", first)}
    if others and isinstance(first, str):
        parts["more_continuation_texts"] = others
    elif others:
        parts["more_continuation_token_ids"] = [pb.TokenIds(ids=cast(tuple[int, ...], one)) for one in others]

    def read(data: bytes, _: str) -> tuple[Score, ...]:
        told = pb.ScoreResponse.FromString(data)
        return tuple(_score(one, told, ask) for one in (told, *told.others))

    message = _written(pb.ScoreRequest, ask.request_id, request_id=ask.request_id, priority=ask.priority, **parts)
    return Rpc(f"/{_SERVICE}/Score", message.SerializeToString(), read, ask.request_id)


def tokenize_rpc(given: str | Chat, add_special_tokens: bool | None) -> Rpc[tuple[int, ...]]:
    special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
    message = _written(pb.TokenizeRequest, "", **_prompt(given), **special)
    read = pb.TokenizeResponse.FromString
    return Rpc(f"/{_SERVICE}/Tokenize", message.SerializeToString(), lambda data, _: tuple(read(data).token_ids))


def detokenize_rpc(token_ids: Sequence[int]) -> Rpc[str]:
    message = pb.DetokenizeRequest(token_ids=pb.TokenIds(ids=token_ids))
    read = pb.DetokenizeResponse.FromString
    return Rpc(f"/{_SERVICE}/Detokenize", message.SerializeToString(), lambda data, _: str(read(data).text))


def model_info_rpc() -> Rpc[ModelInfo]:
    return Rpc(f"/{_SERVICE}/GetModelInfo", b"", _model_info)


def health_rpc(mode: str = "") -> Rpc[bool]:
    """Whether the service serves, or a mode of it. A message of grpc.health.v1 has one short string, its answer one
    number: no generated code is needed for them."""
    name = f"{_SERVICE}.{mode}".encode() if mode else b""
    return Rpc(_HEALTH, b"\n" + bytes([len(name)]) + name if name else b"", lambda data, _: data == _SERVING)


def error_from(
    code: grpc.StatusCode, message: str, trailing: Iterable[tuple[str, Any]], request_id: str
) -> ServiceError:
    """The error of a status with its google.rpc details."""
    metadata = dict(trailing)
    violations: tuple[FieldViolation, ...] = ()
    retry_after_s, keys_limit = None, False
    for packed in status_pb2.Status.FromString(metadata.get(_STATUS, b"")).details:
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if packed.Unpack(bad):
            violations = tuple(FieldViolation(one.field, one.description) for one in bad.field_violations)
        elif packed.Unpack(retry):
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif packed.Is(error_details_pb2.QuotaFailure.DESCRIPTOR):
            keys_limit = True
    service_id = str(metadata.get(_SERVICE_ID, ""))
    told = Details(code.name, None, request_id, service_id, retry_after_s, violations, keys_limit=keys_limit)
    return error_of(message or code.name, told)


def service_id_in(trailing: Iterable[tuple[str, Any]] | None) -> str:
    return str(dict(trailing or ()).get(_SERVICE_ID, ""))


def _generate_message(ask: Ask) -> bytes:
    words = {name: _number(name, word, ask.request_id) for name, word in ask.params.items() if name in _ENUMS}
    given = {**ask.params, **words}
    if "structured_outputs" in given:
        given["structured_outputs"] = _structured(given["structured_outputs"], ask.request_id)
    params = _written(pb.DecodingParams, ask.request_id, **given)
    prompt: dict[str, Any] = _prompt(ask.prompt)
    beside = {name: getattr(ask, name) for name in _BESIDE if getattr(ask, name) is not None}
    message: bytes = _written(pb.GenerateRequest, ask.request_id, params=params, **prompt, **beside).SerializeToString()
    return message


def _scored_part(name: str, part: str | tuple[int, ...]) -> dict[str, Any]:
    if isinstance(part, str):
        return {f"{name}_text": part}
    return {f"{name}_token_ids": pb.TokenIds(ids=part)}


def _score(one: Any, told: pb.ScoreResponse, ask: ScoreAsk) -> Score:
    """The score of one continuation. The first one is in the answer itself."""
    lists = tuple(one.token_ids), tuple(one.log_probs), tuple(one.is_greedy)
    return Score(told.prompt_tokens, *lists, one.sum_log_prob, ask.request_id, told.cached_tokens)


def _answer(told: Any, usage: Usage, request_id: str, service_id: str) -> Answer:
    """The answer in a GenerateResponse, or in one of its Choices."""
    end = _finished(told.finished)
    return Answer(
        told.text,
        tuple(told.token_ids),
        end.finish_reason,
        usage,
        end.seed,
        end.mode,
        request_id,
        service_id,
        _likelihoods(told.likelihoods),
    )


def _echoed(prompt: pb.EchoedPrompt, answer: Answer, rated: bool) -> Answer:
    """The answer with the prompt before it. The prompt's first token has no log-probability."""
    first = (Likelihood(None),) if rated else ()
    return replace(
        answer,
        text=prompt.text + answer.text,
        token_ids=(*prompt.token_ids, *answer.token_ids),
        likelihoods=(*first, *_likelihoods(prompt.likelihoods), *answer.likelihoods),
    )


def _structured(described: Any, request_id: str) -> Any:
    """The request's structured output, from an object with one name, as over HTTP."""
    kinds = [one.name for one in pb.StructuredOutputs.DESCRIPTOR.fields]
    if not isinstance(described, Mapping) or len(described) != 1 or next(iter(described)) not in kinds:
        wanted = f"wanted an object with one of {', '.join(kinds)}"
        raise InvalidRequest.of("structured_outputs", f"got {described!r:.60}, {wanted}", request_id)
    [(kind, value)] = described.items()
    if kind == "json" and not isinstance(value, str):
        value = json.dumps(value)
    elif kind == "choice":
        value = _written(pb.Choices, request_id, texts=value)
    return _written(pb.StructuredOutputs, request_id, **{kind: value})


def _prompt(prompt: str | Sequence[int] | Chat) -> dict[str, Any]:
    if isinstance(prompt, Chat):
        return {"chat": pb.Chat(messages=[pb.ChatMessage(**message) for message in prompt.messages])}
    return {"text": prompt} if isinstance(prompt, str) else {"token_ids": pb.TokenIds(ids=prompt)}


def _number(name: str, word: object, request_id: str) -> int:
    known: dict[str, int] = {
        label.removeprefix(f"{name}_".upper()).lower(): number for label, number in _ENUMS[name].items() if number
    }
    if word not in known:
        raise InvalidRequest.of(name, f"got {word!r}, wanted one of {', '.join(known)}", request_id)
    return known[str(word)]


def _written(kind: Any, asked_as: str, **values: Any) -> Any:
    """A message of these values. Raises InvalidRequest for the first value that its field cannot hold."""
    message = kind()
    for name, value in values.items():
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError) as error:
            raise InvalidRequest.of(name, f"got {value!r:.60}: {error}", asked_as) from None
    return message


def _event(data: bytes, _: str) -> Event:
    told = pb.GenerateStreamResponse.FromString(data)
    match told.WhichOneof("event"):
        case "block":
            return _block(told.block, told.choice)
        case "step":
            step = told.step
            numbers = tuple(step.positions), tuple(step.token_ids), tuple(step.texts), tuple(step.confidence)
            return Step(step.start, step.size, step.step, *numbers, told.choice)
        case "round":
            one = told.round
            draft = tuple(one.draft), tuple(one.draft_texts)
            return Round(one.start, *draft, one.num_accepted, one.token_id, one.text, told.choice)
    return _finished(told.finished, told.choice)


def _block(block: pb.CommittedBlock, choice: int) -> Block:
    usage = Usage(
        0,
        len(block.token_ids),
        block.num_steps,
        block.num_blocks,
        block.num_drafted,
        block.num_accepted,
        block.num_ar_blocks,
        block.num_diffusion_blocks,
    )
    return Block(block.start, tuple(block.token_ids), block.text, usage, _likelihoods(block.likelihoods), choice)


def _usage(told: pb.Usage) -> Usage:
    return Usage(*(getattr(told, name) for name in Usage.__dataclass_fields__))


def _finished(end: pb.Finished, choice: int = 0) -> Finished:
    reason = pb.FinishReason.Name(end.finish_reason).removeprefix("FINISH_REASON_").lower()
    return Finished(cast(FinishReason, reason), _usage(end.usage), end.seed, _word(pb.Mode, end.mode), choice)


def _likelihoods(likelihoods: Sequence[pb.Likelihood]) -> tuple[Likelihood, ...]:
    return tuple(_likelihood(one) for one in likelihoods)


def _likelihood(one: pb.Likelihood) -> Likelihood:
    texts = one.top_texts or [""] * len(one.top_token_ids)
    tops = zip(texts, one.top_log_probs, one.top_token_ids, strict=True)
    return Likelihood(
        one.log_prob,
        tuple(Alternative(text, log_prob, token) for text, log_prob, token in tops),
        one.confidence if one.HasField("confidence") else None,
        one.text,
    )


def _model_info(data: bytes, _: str) -> ModelInfo:
    told = pb.GetModelInfoResponse.FromString(data)
    defaults: dict[str, object] = {field.name: value for field, value in told.defaults.ListFields()}
    words = {name: _word(_ENUMS[name], cast(int, defaults[name])) for name in _ENUMS.keys() & defaults.keys()}
    return ModelInfo(
        told.model_name,
        tuple(_word(pb.Mode, mode) for mode in told.modes),
        told.max_sequence_length,
        told.checkpoint_fingerprint,
        told.checkpoint_layout,
        told.vocab_size,
        told.has_tokenizer,
        {**defaults, **words},
        told.version,
    )


def _word(enum: Any, number: int) -> str:
    """`ar` for MODE_AR. A number without a name in this client is returned as that number."""
    return enum.Name(number).partition("_")[2].lower() if number in enum.values() else str(number)
