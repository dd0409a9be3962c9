"""Between `twotower.v1.DecodingParams` and the parameters by name, whatever parameters are declared."""

from collections.abc import Mapping
from typing import Any

from twotower.core import Mode
from twotower.pb.twotower.v1 import generation_pb2 as pb


def given_in(message: pb.DecodingParams) -> dict[str, object]:
    """What the client gave, by name. Lists are the message's own: they may be far too long to be copied."""
    given: dict[str, object] = {field.name: value for field, value in message.ListFields()}
    if message.mode:
        given["mode"] = _mode_word(message.mode)
    return given


def params_message(values: Mapping[str, Any]) -> pb.DecodingParams:
    """A message of checked values by name."""
    modes = {"mode": mode_name(values["mode"])} if "mode" in values else {}
    return pb.DecodingParams(**{**values, **modes})


def mode_name(mode: Mode) -> Any:
    """The wire's name; messages take names for enums."""
    return f"MODE_{mode.upper()}"


def _mode_word(number: int) -> str | int:
    """The library's word for a mode; a number this server has no word for stays a number, and is refused there."""
    name = pb.Mode.Name(number) if number in pb.Mode.values() else None
    return number if name is None else name.removeprefix("MODE_").lower()
