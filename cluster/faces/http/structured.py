"""Translates other completion APIs' structured output into our parameter.

OpenAI's `response_format`, and vLLM's older `guided_json`, `guided_regex`, `guided_choice` and `guided_grammar`. Errors
inside them are reported under `structured_outputs`.
"""

from collections.abc import Mapping

from twotower.errors import InvalidRequest
from twotower.showing import show

OURS = "structured_outputs"
_GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}
_FORMAT = "response_format"
_FORMATS = "an object whose type is text, json_object or json_schema"
_ABOUT_SCHEMA = frozenset({"name", "description", "schema", "strict"})


def with_structured(body: Mapping[str, object]) -> Mapping[str, object]:
    """The body with our parameter instead of the others' fields. Raises InvalidRequest if there are two of them."""
    asked = [name for name in (OURS, _FORMAT, *_GUIDED) if body.get(name) is not None]
    if asked in ([], [OURS]):
        return {name: value for name, value in body.items() if name != _FORMAT and name not in _GUIDED}
    constraints = {name: _constraint(name, body[name]) for name in asked}
    wanted = [name for name, constraint in constraints.items() if constraint is not None]
    if len(wanted) > 1:
        raise InvalidRequest.of(wanted[1], f"got it beside {wanted[0]}, wanted one of them")
    rest = {name: value for name, value in body.items() if name not in (OURS, _FORMAT, *_GUIDED)}
    return {**rest, OURS: constraints[wanted[0]]} if wanted else rest


def _constraint(name: str, value: object) -> object:
    """None if it has no effect."""
    if name == OURS:
        return value
    return _of_format(value) if name == _FORMAT else {_GUIDED[name]: value}


def _of_format(value: object) -> object:
    match value:
        case {"type": "text", **rest} if not rest:
            return None
        case {"type": "json_object", **rest} if not rest:
            return {"json_object": True}
        case {"type": "json_schema", "json_schema": {"schema": schema, **about}, **rest} if not rest:
            if about.keys() <= _ABOUT_SCHEMA:
                return {"json": schema}
            others = [name for name in about if name not in _ABOUT_SCHEMA]
            raise InvalidRequest.of(_FORMAT, f"got a json_schema with {show(others)}, wanted name and schema")
        case {"type": "json_schema"}:
            raise InvalidRequest.of(_FORMAT, f"got {show(value)}, wanted an object json_schema with a schema in it")
    raise InvalidRequest.of(_FORMAT, f"got {show(value)}, wanted {_FORMATS}")
