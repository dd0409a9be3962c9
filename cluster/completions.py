"""OpenAI's text-completion request, read strictly. docs/api.md tells every field.

A field that is unknown, or that asks for what this service cannot do, is refused by name; null counts as not given.
"""

import difflib
import heapq
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.generation import Ask
from cluster.neutral_values import NEUTRAL
from twotower.errors import FieldError, InvalidRequest
from twotower.strict_json import kind_of
from twotower.validation import Problems, show, show_name

MAX_PROMPTS, MAX_LABEL = 256, 512
_MAX_NAMED = 8
_LONGEST_NAME = 60  # of one that is looked up among ours

_DIFFUSION = ("mode", "block_size", "steps_per_block", "confidence_threshold")
_PARAMS = {
    "max_tokens": "max_new_tokens",
    **{name: name for name in ("temperature", "top_k", "top_p", "seed", "stop_token_ids", "ignore_eos")},
}
_OURS = ("model", "prompt", "diffusion", "stop", "stream", "stream_options", "request_id", "user", "priority")
_KNOWN = (*_OURS, *_PARAMS, *(name for name in NEUTRAL if "." not in name))
_STREAM_FLAGS = ("include_usage", "continuous_usage_stats")
_OUTSIDE_NAMES = {"max_new_tokens": "max_tokens", **{name: f"diffusion.{name}" for name in _DIFFUSION}}


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """A completion request: one Ask per prompt.

    `id` is ours and unlike any other; `label` is the client's own name for the call, which may be any other call's too.
    `include_usage`: an event of its own at the end of a stream; `continuous_usage`: on every event.
    """

    id: str
    label: str
    model: str | None
    asks: tuple[Ask, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool

    @property
    def name(self) -> str:
        """For the log."""
        return f"{self.id} ({self.label})" if self.label else self.id


def parse_call(body: Mapping[str, object], label: str = "") -> CompletionCall:
    """Everything but the parameters' values, which the library checks. Raises InvalidRequest."""
    given = {name: value for name, value in body.items() if value is not None}
    problems = Problems()
    for name in heapq.nsmallest(_MAX_NAMED, given.keys() - set(_KNOWN)):
        problems.say(show_name(name), f"unknown field{_near(name)}")
    _check_neutral(given, "", problems)
    params = {inside: given[outside] for outside, inside in _PARAMS.items() if outside in given}
    if params.get("top_k") == -1:  # as vLLM, SGLang and Hugging Face say that it is off
        params["top_k"] = 0
    params |= _diffusion(given.get("diffusion", {}), problems)
    options = _stream_options(given.get("stream_options", {}), problems)
    stream = _flag("stream", given.get("stream", False), problems)
    if any(options.values()) and not stream:
        problems.say("stream_options", "only with stream: true")
    label = _text("request_id", given.get("request_id", ""), problems) or label  # empty: as over gRPC
    model = _text("model", given.get("model", ""), problems)
    _text("user", given.get("user", ""), problems)
    prompts = _prompts(given.get("prompt"), problems)
    problems.raise_any()
    call_id = f"cmpl-{uuid.uuid4().hex}"
    ids = [call_id] if len(prompts) == 1 else [f"{call_id}-{place}" for place in range(len(prompts))]
    stop, priority = given.get("stop", ()), given.get("priority", 0)
    asks = tuple(
        Ask(prompt, params, stop, label, priority, own_id) for prompt, own_id in zip(prompts, ids, strict=True)
    )
    usage, continuous = (options.get(flag, False) for flag in _STREAM_FLAGS)
    return CompletionCall(call_id, label, model or None, asks, stream, usage, continuous)


def outside_problems(error: InvalidRequest, place: int | None = None) -> InvalidRequest:
    """The same problems under the names of this shape; `place` is the prompt's, where there are several."""
    prompt = "prompt" if place is None else f"prompt[{place}]"
    return InvalidRequest([FieldError(_outside_name(p.field, prompt), p.message) for p in error.problems])


def _near(name: str) -> str:
    near = difflib.get_close_matches(name[:_LONGEST_NAME], [*_KNOWN, *_DIFFUSION], n=1, cutoff=0.5)
    if not near:
        return ""
    return f"; did you mean {f'diffusion.{near[0]}' if near[0] in _DIFFUSION else near[0]}?"


def _check_neutral(given: Mapping[str, object], inside: str, problems: Problems) -> None:
    """Fields that are taken only where they ask for nothing; `inside`: of which field these are."""
    for name, value in given.items():
        neutral = NEUTRAL.get(inside + name)
        if neutral is not None and not neutral.takes(value):
            problems.say(inside + name, f"got {show(value)}, wanted {neutral.wanted}: not supported here")


def _diffusion(value: object, problems: Problems) -> dict[str, object]:
    if not isinstance(value, dict):
        problems.say("diffusion", f"got {kind_of(value)}, wanted an object with {', '.join(_DIFFUSION)}")
        return {}
    for name in heapq.nsmallest(_MAX_NAMED, value.keys() - set(_DIFFUSION)):
        near = difflib.get_close_matches(name[:_LONGEST_NAME], _DIFFUSION, n=1)
        hint = f"; did you mean {near[0]}?" if near else f", wanted one of {', '.join(_DIFFUSION)}"
        problems.say(f"diffusion.{show_name(name)}", f"unknown field{hint}")
    return {name: value[name] for name in _DIFFUSION if value.get(name) is not None}


def _stream_options(value: object, problems: Problems) -> dict[str, bool]:
    name = "stream_options"
    if not isinstance(value, dict):
        problems.add(name, value, f"an object with {' and '.join(_STREAM_FLAGS)}")
        return {}
    given = {key: flag for key, flag in value.items() if flag is not None}
    for key in sorted(given.keys() - set(_STREAM_FLAGS) - _neutral_inside(name))[:_MAX_NAMED]:
        problems.say(f"{name}.{show_name(key)}", f"unknown field, wanted one of {', '.join(_STREAM_FLAGS)}")
    _check_neutral(given, f"{name}.", problems)
    return {key: _flag(f"{name}.{key}", given[key], problems) for key in _STREAM_FLAGS if key in given}


def _neutral_inside(name: str) -> set[str]:
    return {inner.removeprefix(f"{name}.") for inner in NEUTRAL if inner.startswith(f"{name}.")}


def _flag(name: str, value: object, problems: Problems) -> bool:
    if not isinstance(value, bool):
        problems.add(name, value, "true or false")
    return value is True


def _text(name: str, value: object, problems: Problems) -> str:
    if not isinstance(value, str):
        problems.add(name, value, "a string")
    elif len(value) > MAX_LABEL:
        problems.say(name, f"got a string of {len(value)} characters, wanted at most {MAX_LABEL}")
    else:
        return value
    return ""


def _prompts(value: object, problems: Problems) -> list[str | Sequence[object]]:
    """One prompt or many: a string, token ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    wanted = "a string, a list of token ids, or a list of either"
    if not isinstance(value, list):
        problems.add("prompt", value, wanted) if value is not None else problems.say(
            "prompt", f"missing, wanted {wanted}"
        )
        return []
    if not value or type(value[0]) not in (str, list):
        return [value]
    if len(value) > MAX_PROMPTS:
        problems.say("prompt", f"got {len(value)} prompts, wanted at most {MAX_PROMPTS}")
        return []
    return value if len(set(map(type, value))) == 1 else [value]


def _outside_name(field: str, prompt: str) -> str:
    if field == "prompt" or re.match(r"prompt_token_ids\b", field):
        return prompt + field.removeprefix("prompt_token_ids").removeprefix("prompt")
    return _OUTSIDE_NAMES.get(field, field)
