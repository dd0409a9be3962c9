"""A text-completion request, read strictly from its body. docs/api.md tells every field.

A field that is unknown, or that asks for what this service cannot do, is refused by name; null counts as not given.
"""

import difflib
import heapq
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.faces.http.completion_models import PROMPT, CompletionRequest
from cluster.faces.http.neutral_values import NEUTRAL
from cluster.runs.generation import Ask
from twotower.core import PARAMETERS, TRACE
from twotower.errors import FieldError, InvalidRequest
from twotower.showing import show, show_name

_MAX_NAMED = 8
_LONGEST_NAME = 60  # of one that is looked up among ours
_OUTSIDE_NAMES = {name: parameter.http for name, parameter in {**PARAMETERS, "trace": TRACE}.items()}
_OBJECTS = ("diffusion", "stream_options")
_WORDS = {"bool_type": "true or false", "string_type": "a string"}


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
    read = _read(body)
    params = read.params()
    if params.get("top_k") == -1:  # as vLLM, SGLang and Hugging Face say that it is off
        params["top_k"] = 0
    trace = read.diffusion.trace
    if trace is True and not read.stream:
        raise InvalidRequest.of(TRACE.http, "got true, wanted it only with stream: true")
    label = read.request_id or label  # empty: as over gRPC
    call_id = f"cmpl-{uuid.uuid4().hex}"
    ids = [call_id] if len(read.prompt) == 1 else [f"{call_id}-{place}" for place in range(len(read.prompt))]
    asks = tuple(
        Ask(prompt, params, read.stop, label, read.priority, own_id, trace)
        for prompt, own_id in zip(read.prompt, ids, strict=True)
    )
    options = read.stream_options
    return CompletionCall(
        call_id, label, read.model or None, asks, read.stream, options.include_usage, options.continuous_usage_stats
    )


def outside_problems(error: InvalidRequest, place: int | None = None) -> InvalidRequest:
    """The same problems under the names of this shape; `place` is the prompt's, where there are several."""
    prompt = "prompt" if place is None else f"prompt[{place}]"
    return InvalidRequest([FieldError(_outside_name(p.field, prompt), p.message) for p in error.problems])


def _read(body: Mapping[str, object]) -> CompletionRequest:
    ours, refused = _ours(body)
    found: list[ErrorDetails] = []
    try:
        read: CompletionRequest = CompletionRequest.model_validate(ours)
    except ValidationError as error:
        found = error.errors(include_url=False)
    if found or refused:
        unknown = [problem for problem in found if problem["type"] == "extra_forbidden"]
        # To find what may be meant takes a while, so only of those that are told.
        first = map(_told, heapq.nsmallest(_MAX_NAMED, unknown, key=lambda problem: problem["loc"]))
        rest = (_told(problem) for problem in found if problem["type"] != "extra_forbidden")
        raise InvalidRequest([*first, *refused, *rest])
    return read


def _ours(given: Mapping[str, object], inside: str = "") -> tuple[dict[str, object], list[FieldError]]:
    """What is given, but for null and for fields of other APIs, and the latter where they ask for something.

    `inside`: of which field these are.
    """
    ours: dict[str, object] = {}
    refused: list[FieldError] = []
    for name, value in given.items():
        neutral = NEUTRAL.get(inside + name)
        if value is None:
            continue
        if neutral is not None:
            if not neutral.takes(value):
                wanted = f"wanted {neutral.wanted}: not supported here"
                refused.append(FieldError(inside + name, f"got {show(value)}, {wanted}"))
        elif name in _OBJECTS and isinstance(value, dict) and not inside:
            ours[name], more = _ours(value, f"{name}.")
            refused += more
        else:
            ours[name] = value
    return ours, refused


def _told(problem: ErrorDetails) -> FieldError:
    return FieldError(".".join(show_name(str(part)) for part in problem["loc"]), _message(problem))


def _instead(*place: str | int) -> str:
    """What may be meant by an unknown name."""
    *outer, name = map(str, place)
    own = _model_at(outer).model_fields
    inner = {} if outer else _model_at(["diffusion"]).model_fields
    neutral = () if outer else (other for other in NEUTRAL if "." not in other)
    near = difflib.get_close_matches(name[:_LONGEST_NAME], [*own, *neutral, *inner], n=1, cutoff=0.5)
    if near:
        return f"; did you mean {f'diffusion.{near[0]}' if near[0] in inner else near[0]}?"
    return f", wanted one of {', '.join(own)}" if outer else ""


def _message(problem: ErrorDetails) -> str:
    got = problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown field{_instead(*problem['loc'])}"
        case "missing":
            return f"missing, wanted {PROMPT}"
        case "value_error":
            return str(problem["ctx"]["error"])
        case "string_too_long":
            return f"got a string of {len(got)} characters, wanted at most {problem['ctx']['max_length']}"
        case "model_type":
            return f"got {show(got)}, wanted an object with {', '.join(_model_at(problem['loc']).model_fields)}"
    return f"got {show(got)}, wanted {_WORDS[problem['type']]}"


def _model_at(place: Iterable[object]) -> type[BaseModel]:
    model: Any = CompletionRequest
    for name in place:
        model = model.model_fields[name].annotation
    return model  # type: ignore[no-any-return]


def _outside_name(field: str, prompt: str) -> str:
    if field == "prompt" or re.match(r"prompt_token_ids\b", field):
        return prompt + field.removeprefix("prompt_token_ids").removeprefix("prompt")
    return _OUTSIDE_NAMES.get(field, field)
