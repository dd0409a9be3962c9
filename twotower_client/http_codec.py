"""The HTTP face: writes calls as bodies, reads answers from bodies and server-sent events. Opens no connection."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from twotower_client.answers import (
    Alternative,
    Answer,
    Block,
    Event,
    Finished,
    Likelihood,
    ModelInfo,
    Readiness,
    Round,
    Score,
    Step,
    Usage,
)
from twotower_client.asking import Ask, Chat, ScoreAsk
from twotower_client.errors import InvalidRequest
from twotower_client.http_errors import error_from, unexpected
from twotower_client.server_sent_events import EventReader

# HTTP's names of parameters that have another name in an Ask.
NAMES = {
    "max_new_tokens": "max_tokens",
    **{
        name: f"diffusion.{name}"
        for name in (
            "mode",
            "block_size",
            "steps_per_block",
            "confidence_threshold",
            "draft_steps",
            "draft_threshold",
            "floor",
        )
    },
}
# An Ask's fields that a body has under the same name, if they differ from the default.
_BESIDE = ("request_id", "priority", "stop", "n", "best_of", "include_stop_str_in_output", "add_special_tokens")
_DONE = "[DONE]"
_TRACE = "twotower.trace"
Told = TypeVar("Told")


@dataclass(frozen=True, slots=True)
class HttpCall(Generic[Told]):
    """A call to make: its method, its path, its body, how the answer's JSON is read."""

    method: str
    path: str
    read: Callable[[Any], Told]
    body: bytes | None = None
    request_id: str = ""


def completion_call(ask: Ask) -> HttpCall[Answer]:
    """The call for a whole answer. Raises InvalidRequest for an ask that cannot be sent."""
    ask.check_whole()

    def read(told: Any) -> Answer:
        first, *others = (_answer(choice, told, ask) for choice in told["choices"])
        return replace(first, others=tuple(others))

    return HttpCall("POST", _path(ask), read, _answer_body(ask, {"echo": True} if ask.echo else {}), ask.request_id)


def stream_call(ask: Ask) -> HttpCall[None]:
    """The call for a stream. A StreamReader reads its events."""
    ask.check_streams()
    options = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    return HttpCall("POST", _path(ask), lambda _: None, _answer_body(ask, options), ask.request_id)


def score_call(ask: ScoreAsk) -> HttpCall[tuple[Score, ...]]:
    """A single continuation has the field that services without `continuations` know, too."""
    alone = len(ask.continuations) == 1

    def read(told: Any) -> tuple[Score, ...]:
        return tuple(_score(one, told, ask) for one in ([told] if alone else told["scores"]))

    asked = {"continuation": ask.continuations[0]} if alone else {"continuations": ask.continuations}
    body = {"prompt": ask.prompt, **asked, "priority": ask.priority}
    return HttpCall("POST", "/v1/score", read, _encoded({**body, "request_id": ask.request_id}), ask.request_id)


def tokenize_call(given: str | Chat, add_special_tokens: bool | None) -> HttpCall[tuple[int, ...]]:
    body = {**_prompt(given), **({} if add_special_tokens is None else {"add_special_tokens": add_special_tokens})}
    return HttpCall("POST", "/tokenize", lambda told: tuple(told["tokens"]), _encoded(body))


def detokenize_call(token_ids: Sequence[int]) -> HttpCall[str]:
    return HttpCall("POST", "/detokenize", lambda told: str(told["prompt"]), _encoded({"tokens": token_ids}))


def model_call() -> HttpCall[ModelInfo]:
    def read(told: Any) -> ModelInfo:
        card = told["data"][0]
        return ModelInfo(card["id"], tuple(card["modes"]), card["max_model_len"], card["checkpoint_fingerprint"])

    return HttpCall("GET", "/v1/models", read)


def health_call() -> HttpCall[bool]:
    return HttpCall("GET", "/health", lambda told: bool(told["status"] == "alive"))


def ready_call() -> HttpCall[Readiness]:
    """The call to /ready. Its body is read with both statuses, 200 and 503."""

    def read(told: Any) -> Readiness:
        if "error" in told:  # from a proxy without a router
            return Readiness(False, {}, str(told["error"]["message"]))
        ready = told["status"] == "ready"
        return Readiness(
            ready, {str(mode): bool(now) for mode, now in told["modes"].items()}, "" if ready else "no cell serves now"
        )

    return HttpCall("GET", "/ready", read)


def answer_in(call: HttpCall[Told], data: bytes) -> Told:
    """The value in the body. Raises UnexpectedAnswer for a body that is not from our service."""
    try:
        return call.read(json.loads(data))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise unexpected(call.path, error, call.request_id) from None


class StreamReader:
    """Reads the events of one call's answers from the bytes of its stream."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._events = EventReader()
        self._used = Usage()  # by all answers
        self._own: dict[int, Usage] = {}  # by each, without the prompt
        self.ended = False

    def push(self, data: bytes) -> list[Event]:
        """The events that these bytes complete. Raises a ServiceError if one of them is an error."""
        told: list[Event] = []
        try:
            for name, event in self._events.push(data):
                told += self._read(name, event)
        except (ValueError, LookupError, TypeError) as error:
            raise unexpected("the stream", error, self._ask.request_id) from None
        return told

    def _read(self, name: str, data: bytes) -> list[Event]:
        if data == _DONE.encode():
            self.ended = True
            return []
        told = json.loads(data)
        if "error" in told:
            raise error_from(None, {}, data, self._ask.request_id)
        return [_traced(told)] if name == _TRACE else self._chunk(told)

    def _chunk(self, told: Any) -> list[Event]:
        choice, usage = told["choices"][0], _usage(told["usage"])
        token_ids, text, place = tuple(choice["token_ids"]), _text(choice), choice["index"]
        own = self._own.get(place, Usage())
        events: list[Event] = []
        cost = replace(usage.less(self._used), prompt_tokens=0, cached_tokens=0)
        if token_ids or text:
            start = own.completion_tokens
            events.append(Block(start, token_ids, text, cost, _likelihoods(choice["logprobs"]), place))
        self._used, self._own[place] = usage, own.plus(cost)
        if choice["finish_reason"] is not None:
            read = {"prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens}
            spent = replace(self._own[place], **read)
            mode = self._ask.params.get("mode")
            events.append(Finished(choice["finish_reason"], spent, choice["seed"], mode, place))
        return events


def _answer(choice: Any, told: Any, ask: Ask) -> Answer:
    """One of the returned answers."""
    return Answer(
        _text(choice),
        tuple(choice["token_ids"]),
        choice["finish_reason"],
        _usage(told["usage"]),
        choice["seed"],
        ask.params.get("mode"),
        ask.request_id,
        told["id"],
        _likelihoods(choice["logprobs"]),
    )


def _score(one: Any, told: Any, ask: ScoreAsk) -> Score:
    """The score of one of the returned continuations."""
    lists = tuple(one["token_ids"]), tuple(one["log_probs"]), tuple(one["is_greedy"])
    return Score(told["prompt_tokens"], *lists, one["sum_log_prob"], ask.request_id, _cached(told))


def _text(choice: Any) -> str:
    """The text of a completion or chat, or the text that a chunk adds; a chat's last chunk adds none."""
    if "text" in choice:
        return str(choice["text"])
    return str(choice["message"]["content"] if "message" in choice else choice["delta"].get("content", ""))


def _path(ask: Ask) -> str:
    return "/v1/chat/completions" if isinstance(ask.prompt, Chat) else "/v1/completions"


def _prompt(prompt: str | Sequence[int] | Chat) -> dict[str, object]:
    return {"messages": prompt.messages} if isinstance(prompt, Chat) else {"prompt": prompt}


def _logprobs(ask: Ask) -> dict[str, object]:
    if ask.logprobs is None:
        return {}
    if isinstance(ask.prompt, Chat):
        return {"logprobs": True, "top_logprobs": ask.logprobs}
    return {"logprobs": ask.logprobs}


def _answer_body(ask: Ask, more: Mapping[str, object]) -> bytes:
    body: dict[str, Any] = {**_prompt(ask.prompt), **_logprobs(ask), **more}
    # A completion returns the answer's ids in any case.
    body |= {"return_token_ids": True} if isinstance(ask.prompt, Chat) else {}
    plain = Ask(ask.prompt, "")
    body |= {name: getattr(ask, name) for name in _BESIDE if getattr(ask, name) != getattr(plain, name)}
    for name, value in {**ask.params, **({"trace": True} if ask.trace else {})}.items():
        outer, _, own = NAMES.get(name, "diffusion.trace" if name == "trace" else name).rpartition(".")
        (body.setdefault(outer, {}) if outer else body)[own] = value
    return _encoded(body)


def _encoded(body: Mapping[str, object]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest.of(
            "body", f"cannot be written as JSON: {error}", str(body.get("request_id", ""))
        ) from None


def _usage(told: Mapping[str, Any]) -> Usage:
    counts = {name: told[name] for name in Usage.__dataclass_fields__ if name != "cached_tokens"}
    return Usage(**counts, cached_tokens=_cached(told))


def _cached(told: Mapping[str, Any]) -> int:
    """0 from a service of an older version, which does not return it."""
    return int((told.get("prompt_tokens_details") or {}).get("cached_tokens", 0))


def _traced(told: Any) -> Event:
    if "step" in told:
        step = told["step"]
        positions, tokens, texts, confidence = (
            tuple(step[name]) for name in ("positions", "token_ids", "texts", "confidence")
        )
        return Step(step["start"], step["size"], step["step"], positions, tokens, texts, confidence, told["index"])
    one = told["round"]
    draft = tuple(one["draft"]), tuple(one["draft_texts"])
    return Round(one["start"], *draft, one["num_accepted"], one["token_id"], one["text"], told["index"])


def _likelihoods(told: Any) -> tuple[Likelihood, ...]:
    if told is None:
        return ()
    if "content" in told:
        return tuple(_of_chat(one) for one in told["content"])
    confidence = told["confidence"] or [None] * len(told["tokens"])
    rows = zip(told["token_logprobs"], told["top_logprobs"], confidence, told["tokens"], strict=True)
    return tuple(Likelihood(log_prob, _alternatives(top), sure, text) for log_prob, top, sure, text in rows)


def _of_chat(one: Any) -> Likelihood:
    top = tuple(Alternative(other["token"], other["logprob"]) for other in one["top_logprobs"])
    return Likelihood(one["logprob"], top, None, one["token"])


def _alternatives(top: Mapping[str, float] | None) -> tuple[Alternative, ...]:
    return tuple(Alternative(text, log_prob) for text, log_prob in (top or {}).items())
