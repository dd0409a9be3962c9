"""OpenAI's text-completion request, read strictly. docs/api.md tells every field.

A field that is unknown, or that asks for what this service cannot do, is refused by name; null counts as not given.
"""

import difflib
import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.generation import Ask
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
_ONLY_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
_KNOWN = (*_OURS, *_PARAMS, *_ONLY_NEUTRAL)
_OUTSIDE_NAMES = {"max_new_tokens": "max_tokens", **{name: f"diffusion.{name}" for name in _DIFFUSION}}


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """A completion request: one Ask per prompt."""

    model: str | None
    asks: tuple[Ask, ...]
    stream: bool
    include_usage: bool
    request_id: str


def parse_call(body: Mapping[str, object], request_id: str) -> CompletionCall:
    """Everything but the parameters' values, which the library checks. Raises InvalidRequest."""
    given = {name: value for name, value in body.items() if value is not None}
    problems = Problems()
    for name in heapq.nsmallest(_MAX_NAMED, given.keys() - set(_KNOWN)):
        problems.say(show_name(name), f"unknown field{_near(name)}")
    for name, neutral in _ONLY_NEUTRAL.items():
        if name in given and not any(
            given[name] == value and not _is_mistyped(given[name], value) for value in neutral
        ):
            problems.say(name, f"got {show(given[name])}, but {name} is not supported here")
    params = {inside: given[outside] for outside, inside in _PARAMS.items() if outside in given}
    params |= _diffusion(given.get("diffusion", {}), problems)
    options = _flags("stream_options", given.get("stream_options", {}), problems)
    stream = _flag("stream", given.get("stream", False), problems)
    if options and not stream:
        problems.say("stream_options", "only with stream: true")
    request_id = _text("request_id", given.get("request_id", ""), problems) or request_id  # empty: as over gRPC
    model = _text("model", given.get("model", ""), problems)
    _text("user", given.get("user", ""), problems)
    prompts = _prompts(given.get("prompt"), problems)
    problems.raise_any()
    suffixes = [""] if len(prompts) == 1 else [f"-{place}" for place in range(len(prompts))]
    stop, priority = given.get("stop", ()), given.get("priority", 0)
    asks = tuple(
        Ask(prompt, params, stop, request_id, priority, suffix)
        for prompt, suffix in zip(prompts, suffixes, strict=True)
    )
    return CompletionCall(model or None, asks, stream, options.get("include_usage", False), request_id)


def outside_problems(error: InvalidRequest, place: int | None = None) -> InvalidRequest:
    """The same problems under the names of this shape; `place` is the prompt's, where there are several."""
    prompt = "prompt" if place is None else f"prompt[{place}]"
    return InvalidRequest([FieldError(_outside_name(p.field, prompt), p.message) for p in error.problems])


def _near(name: str) -> str:
    near = difflib.get_close_matches(name[:_LONGEST_NAME], [*_KNOWN, *_DIFFUSION], n=1, cutoff=0.5)
    if not near:
        return ""
    return f"; did you mean {f'diffusion.{near[0]}' if near[0] in _DIFFUSION else near[0]}?"


def _is_mistyped(got: object, wanted: object) -> bool:
    """Python finds True == 1; JSON does not."""
    return isinstance(got, bool) is not isinstance(wanted, bool)


def _diffusion(value: object, problems: Problems) -> dict[str, object]:
    if not isinstance(value, dict):
        problems.say("diffusion", f"got {kind_of(value)}, wanted an object with {', '.join(_DIFFUSION)}")
        return {}
    for name in heapq.nsmallest(_MAX_NAMED, value.keys() - set(_DIFFUSION)):
        near = difflib.get_close_matches(name[:_LONGEST_NAME], _DIFFUSION, n=1)
        hint = f"; did you mean {near[0]}?" if near else f", wanted one of {', '.join(_DIFFUSION)}"
        problems.say(f"diffusion.{show_name(name)}", f"unknown field{hint}")
    return {name: value[name] for name in _DIFFUSION if value.get(name) is not None}


def _flags(name: str, value: object, problems: Problems) -> dict[str, bool]:
    if not isinstance(value, dict) or value.keys() - {"include_usage"}:
        problems.add(name, value, "an object with include_usage")
        return {}
    return {key: _flag(f"{name}.{key}", flag, problems) for key, flag in value.items() if flag is not None}


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
