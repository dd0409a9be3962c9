"""Structured output as a kind of parameter: which forms a description may have, not what a description means."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from twotower.errors import InvalidRequest
from twotower.parameters import check_text
from twotower.showing import show

_DESCRIPTIONS = {
    "json": "a JSON Schema, or one as text",
    "json_object": "true",
    "regex": "a regular expression",
    "choice": "a list of texts, none of them empty",
    "grammar": "a grammar in Lark's form",
}


class Constraint(NamedTuple):
    """What a text must match: the `kind` of description, and the description as text."""

    kind: str
    text: str

    @property
    def described(self) -> dict[str, Any]:
        """In the form of a request."""
        if self.kind == "choice":
            return {"choice": json.loads(self.text)}
        return {self.kind: True if self.kind == "json_object" else self.text}


@dataclass(frozen=True, slots=True)
class Constraints:
    """None, or an object with one name that gives the form of the description: `json` (a JSON Schema, or one as text),
    `json_object` (true), `regex`, `choice` (texts) or `grammar`. `most`: the maximum bytes of the description; a
    description that is not text counts as JSON.
    """

    most: int

    def read(self, name: str, value: object) -> Constraint | None:
        if value is None:
            return None
        if isinstance(value, Constraint):
            return value
        if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in _DESCRIPTIONS:
            raise InvalidRequest.of(name, f"got {show(value)}, wanted an object with one of {', '.join(_DESCRIPTIONS)}")
        [(kind, described)] = value.items()
        text = self._text(name, kind, described)
        size = len(check_text(name, text).encode())
        if size > self.most:
            raise InvalidRequest.of(name, f"got {size} bytes of {kind}, wanted at most {self.most}")
        return Constraint(kind, text)

    def _text(self, name: str, kind: str, described: object) -> str:
        match kind, described:
            case "json_object", True:
                return ""
            case "json", Mapping():
                return _dumped(name, described)
            case "choice", [_, *_] if len(described) > self.most:  # before all are looked at
                raise InvalidRequest.of(name, f"got {len(described)} choices, wanted at most {self.most} bytes of them")
            case "choice", [_, *_] if all(isinstance(text, str) and text for text in described):
                return _dumped(name, described)
            case "json" | "regex" | "grammar", str() if described:
                return described
        raise InvalidRequest.of(name, f"got {show(described)} for {kind}, wanted {_DESCRIPTIONS[kind]}")

    @property
    def allowed(self) -> str:
        return f"an object with one of {', '.join(f'`{kind}`' for kind in _DESCRIPTIONS)}, of at most {self.most} bytes"

    @property
    def schema(self) -> dict[str, object]:
        text = {"type": "string", "minLength": 1, "maxLength": self.most}
        kinds = {
            "json": {"anyOf": [{"type": "object"}, text]},
            "json_object": {"const": True},
            "regex": text,
            "choice": {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
            "grammar": text,
        }
        one = {
            "type": "object",
            "properties": kinds,
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 1,
        }
        return {"anyOf": [{"type": "null"}, one]}


def _dumped(name: str, value: object) -> str:
    """As JSON, in its own order."""
    try:
        return json.dumps(dict(value) if isinstance(value, Mapping) else list(value), allow_nan=False)  # type: ignore[call-overload]
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest.of(name, f"no JSON: {error}") from None
