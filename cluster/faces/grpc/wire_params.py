"""Translates between `twotower.v1.DecodingParams` and parameters by name, for all declared parameters."""

import json
from collections.abc import Mapping
from typing import Any

from twotower.constraints import Constraint, Constraints
from twotower.core import PARAMETERS, Mode
from twotower.parameters import Choice, TokenBiases
from twotower.pb.twotower.v1 import generation_pb2 as pb

_ENUMS: dict[str, Any] = {"mode": pb.Mode, "floor": pb.Floor}
assert set(_ENUMS) == {name for name, parameter in PARAMETERS.items() if isinstance(parameter.kind, Choice)}


def given_in(message: pb.DecodingParams) -> dict[str, object]:
    """The given parameters by name. Lists are the message's own, because they may be far too long to be copied."""
    given: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    constraints = {n: _described(v) for n, v in given.items() if isinstance(PARAMETERS[n].kind, Constraints)}
    return {**given, **constraints, **{name: _word(name, given[name]) for name in _ENUMS.keys() & given.keys()}}


def params_message(values: Mapping[str, Any]) -> pb.DecodingParams:
    """A message of checked values by name."""
    words = {name: f"{name}_{values[name]}".upper() for name in _ENUMS.keys() & values.keys()}
    biases = {n: dict(v) for n, v in values.items() if isinstance(PARAMETERS[n].kind, TokenBiases)}
    constraints = {n: _message(v) for n, v in values.items() if isinstance(v, Constraint)}
    return pb.DecodingParams(**{**values, **words, **biases, **constraints})


def _described(message: pb.StructuredOutputs) -> dict[str, object]:
    kind = message.WhichOneof("constraint")
    if kind is None:
        return {}
    described = getattr(message, kind)
    return {kind: list(described.texts) if isinstance(described, pb.Choices) else described}


def _message(constraint: Constraint) -> pb.StructuredOutputs:
    described: Any = constraint.text
    match constraint.kind:
        case "json_object":
            described = True
        case "choice":
            described = pb.Choices(texts=json.loads(constraint.text))
    return pb.StructuredOutputs(**{constraint.kind: described})


def mode_name(mode: Mode) -> Any:
    """The wire's name; messages take names for enums."""
    return f"MODE_{mode.upper()}"


def _word(name: str, number: int) -> str | int:
    """The library's word for a choice; an unknown number stays a number, and the library refuses it."""
    enum = _ENUMS[name]
    return enum.Name(number).removeprefix(f"{name}_".upper()).lower() if number in enum.values() else number
