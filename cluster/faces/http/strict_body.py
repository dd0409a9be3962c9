"""Reads a JSON object strictly into a pydantic model and names every wrong field, in our words.

An unknown field, or one that asks for something unsupported, is refused by name; null counts as not given.
"""

import difflib
import heapq
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.faces.http.neutral_values import Neutral
from twotower.errors import FieldError, InvalidRequest
from twotower.showing import show, show_name

_MAX_NAMED = 8
_LONGEST_NAME = 60  # of a name that is compared with ours
_WORDS = {"bool_type": "true or false", "string_type": "a string"}

Read = TypeVar("Read", bound=BaseModel)


def read_body(kind: type[Read], body: Mapping[str, object], neutral: Mapping[str, Neutral]) -> Read:
    """`neutral`: fields of other clients, and the values at which they have no effect. A dotted name is a field of a
    field. Raises InvalidRequest.
    """
    ours, refused = _ours(kind, body, neutral)
    found: list[ErrorDetails] = []
    try:
        read = kind.model_validate(ours)
    except ValidationError as error:
        found = error.errors(include_url=False)
    if found or refused:
        unknown = [problem for problem in found if problem["type"] == "extra_forbidden"]
        # Finding a similar name takes a while, so it is done only for reported fields.
        first = (
            _told(problem, kind, neutral)
            for problem in heapq.nsmallest(_MAX_NAMED, unknown, key=lambda problem: problem["loc"])
        )
        rest = (_told(problem, kind, neutral) for problem in found if problem["type"] != "extra_forbidden")
        raise InvalidRequest([*first, *refused, *rest])
    return read


def _ours(
    kind: type[BaseModel], given: Mapping[str, object], neutral: Mapping[str, Neutral], inside: str = ""
) -> tuple[dict[str, object], list[FieldError]]:
    """The given fields without nulls and neutral fields of other APIs, and the names of non-neutral ones.

    `inside`: the field that contains these.
    """
    ours: dict[str, object] = {}
    refused: list[FieldError] = []
    objects = _objects(kind)
    for name, value in given.items():
        other = neutral.get(inside + name)
        if value is None:
            continue
        if other is not None:
            if not other.takes(value):
                wanted = f"wanted {other.wanted}: not supported here"
                refused.append(FieldError(inside + name, f"got {show(value)}, {wanted}"))
        elif name in objects and isinstance(value, dict):
            ours[name], more = _ours(objects[name], value, neutral, f"{name}.")
            refused += more
        else:
            ours[name] = value
    return ours, refused


@cache
def _objects(kind: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The fields that are objects themselves. Computed for every body."""
    kinds = {name: field.annotation for name, field in kind.model_fields.items()}
    return {name: inner for name, inner in kinds.items() if isinstance(inner, type) and issubclass(inner, BaseModel)}


def _told(problem: ErrorDetails, kind: type[BaseModel], neutral: Mapping[str, Neutral]) -> FieldError:
    where = ".".join(show_name(str(part)) for part in problem["loc"])
    return FieldError(where, _message(problem, kind, neutral))


def _instead(place: Iterable[str | int], kind: type[BaseModel], neutral: Mapping[str, Neutral]) -> str:
    """The name that an unknown name may mean."""
    *outer, name = map(str, place)
    own = _model_at(outer, kind).model_fields
    objects = {} if outer else _objects(kind)
    inner = {field: where for where, model in objects.items() for field in model.model_fields}
    others = () if outer else (other for other in neutral if "." not in other)
    near = difflib.get_close_matches(name[:_LONGEST_NAME], [*own, *others, *inner], n=1, cutoff=0.5)
    if near:
        where = inner.get(near[0])
        return f"; did you mean {near[0] if where is None or near[0] in own else f'{where}.{near[0]}'}?"
    return f", wanted one of {', '.join(own)}" if outer else ""


def _message(problem: ErrorDetails, kind: type[BaseModel], neutral: Mapping[str, Neutral]) -> str:
    got = problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown field{_instead(problem['loc'], kind, neutral)}"
        case "missing":
            return f"missing, wanted {kind.model_fields[str(problem['loc'][0])].description}"
        case "value_error":
            return str(problem["ctx"]["error"])
        case "string_too_long":
            return f"got a string of {len(got)} characters, wanted at most {problem['ctx']['max_length']}"
        case "model_type":
            return f"got {show(got)}, wanted an object with {', '.join(_model_at(problem['loc'], kind).model_fields)}"
    return f"got {show(got)}, wanted {_WORDS[problem['type']]}"


def _model_at(place: Iterable[object], kind: type[BaseModel]) -> type[BaseModel]:
    model: Any = kind
    for name in place:
        model = model.model_fields[name].annotation
    return model  # type: ignore[no-any-return]
