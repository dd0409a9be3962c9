"""A flag for each parameter of a request, for all commands that take parameters."""

from argparse import SUPPRESS, Namespace, _ActionsContainer
from collections.abc import Collection, Mapping
from typing import Any

from twotower.commands.parser import biases, ids, json_value, number
from twotower.constraints import Constraint, Constraints
from twotower.core import LOGPROBS, PARAMETERS, PRIORITY, STOP, TRACE
from twotower.parameters import Choice, Flag, Integer, Number, Parameter, Texts, TokenBiases, TokenIds


def add_parameter_flags(group: _ActionsContainer, own_defaults: bool = True, without: Collection[str] = ()) -> None:
    """`own_defaults`: whether a missing flag takes the declared default; a service has its own defaults. `without`:
    parameters for which the command has its own flag.
    """
    for name, parameter in PARAMETERS.items():
        if name not in without:
            _add(group, name, parameter, SUPPRESS, own_defaults)
    _add(group, "stop", STOP, [])


def add_priority_flag(group: _ActionsContainer) -> None:
    _add(group, "priority", PRIORITY, PRIORITY.default)


def add_telling_flags(group: _ActionsContainer) -> None:
    """Flags for what is shown beside an answer's text."""
    _add(group, "logprobs", LOGPROBS, SUPPRESS)
    told = f"show which positions of a block each step fixes; never changes a token ({_modes_told(TRACE)})"
    group.add_argument("--trace", action="store_true", default=SUPPRESS, help=told)


def given_telling(options: Namespace) -> dict[str, object]:
    """The given flags of `add_telling_flags`, unchecked, by name."""
    return {name: getattr(options, name) for name in ("logprobs", "trace") if hasattr(options, name)}


def given_parameters(options: Namespace) -> dict[str, object]:
    """The given parameters of DecodingParams, unchecked, by name."""
    return {name: getattr(options, name) for name in PARAMETERS if hasattr(options, name)}


def _add(group: _ActionsContainer, name: str, parameter: Parameter, default: object, tell_default: bool = True) -> None:
    flag, told = f"--{name.replace('_', '-')}", _help(parameter, tell_default)
    match parameter.kind:
        case Flag():
            group.add_argument(flag, action="store_true", default=default, help=told)
        case Texts():
            group.add_argument(flag, action="append", default=default, metavar="TEXT", help=f"{told}; may be repeated")
        case TokenIds():
            group.add_argument(flag, type=ids, default=default, metavar="7,8", help=told)
        case Constraints():
            group.add_argument(flag, type=json_value, default=default, metavar="JSON", help=told)
        case TokenBiases():
            group.add_argument(flag, type=biases, default=default, metavar="7:1.5,8:-2", help=told)
        case kind:
            metavar = {Choice: name.upper(), Integer: "N", Number: "X"}[type(kind)]
            group.add_argument(flag, type=number, default=default, metavar=metavar, help=told)


def _help(parameter: Parameter, tell_default: bool) -> str:
    notes = [_modes_told(parameter)] if parameter.modes else []
    if not isinstance(parameter.kind, Flag):
        notes.append(parameter.kind.allowed)
        if tell_default:
            notes.append(f"default: {parameter.default_told}")
    told = f" ({'; '.join(notes)})" if notes else ""
    return f"{parameter.meaning}{told}".replace("`", "")


def _modes_told(parameter: Parameter) -> str:
    return f"{' and '.join(parameter.modes)} only"


def as_sent(values: Mapping[str, Any]) -> dict[str, Any]:
    """Checked values in the form of a request."""
    return {name: _as_sent(name, value) for name, value in values.items()}


def _as_sent(name: str, value: Any) -> Any:
    if isinstance(PARAMETERS[name].kind, TokenBiases):
        return dict(value)
    return value.described if isinstance(value, Constraint) else value
