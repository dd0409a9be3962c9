"""The messages of a chat as clients send them: text by role. Anything but text is refused by name."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from cluster.faces.http.completion_models import MAX_LABEL
from cluster.faces.http.neutral_values import Neutral
from twotower.errors import FieldError, InvalidRequest
from twotower.showing import show, show_name
from twotower.text.chat_template import Conversation

MAX_MESSAGES = 1024
MAX_PARTS = 1024  # of a message
ROLES = ("system", "developer", "user", "assistant")
MESSAGES = f"a list of 1 to {MAX_MESSAGES} messages"
_CONTENT = "a string or a list of parts of type text"
_NAMED = 8  # problems that are reported
_TEXT = {"type": "string"}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _TEXT},
    "required": ["type", "text"],
    "additionalProperties": False,
}
SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {
        "type": "object",
        "properties": {
            "role": {"type": "string", "enum": list(ROLES)},
            "content": {"anyOf": [_TEXT, {"type": "array", "items": _PART, "minItems": 1, "maxItems": MAX_PARTS}]},
            "name": {"type": "string", "maxLength": MAX_LABEL},
        },
        "required": ["role", "content"],
    },
}

# Fields of an answer that is sent back, ours or OpenAI's, and fields that ask for more than text.
NEUTRAL_OF_MESSAGES: Mapping[str, Neutral] = {
    "tool_calls": Neutral(([],), "OpenAI"),
    "function_call": Neutral((), "OpenAI"),
    "tool_call_id": Neutral(("",), "OpenAI"),
    "refusal": Neutral(("",), "OpenAI"),
    "audio": Neutral((), "OpenAI"),
    "annotations": Neutral(([],), "OpenAI"),
}


def conversation_of(given: object) -> Conversation:
    """Raises InvalidRequest for the first few errors, each with its place."""
    if not isinstance(given, list) or not given:
        raise InvalidRequest.of("messages", f"got {show(given)}, wanted {MESSAGES}")
    if len(given) > MAX_MESSAGES:
        raise InvalidRequest.of("messages", f"got {len(given)} messages, wanted at most {MAX_MESSAGES}")
    problems = list[FieldError]()
    messages = []
    for place, message in enumerate(given):
        problems += islice(_problems(message, f"messages[{place}]"), _NAMED - len(problems))
        if len(problems) >= _NAMED:
            break
        if not problems:
            messages.append(_message(message))
    if problems:
        raise InvalidRequest(problems)
    return Conversation(tuple(messages))


def _message(given: Mapping[str, Any]) -> dict[str, str]:
    """A correct message. Parts of text are joined as in vLLM."""
    content = given["content"]
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    named = {"name": given["name"]} if given.get("name") else {}
    return {"role": given["role"], "content": text, **named}


def _problems(message: object, where: str) -> Iterator[FieldError]:
    if not isinstance(message, dict):
        yield FieldError(where, f"got {show(message)}, wanted an object with role and content")
        return
    if message.get("role") not in ROLES:
        told = "not supported here: " if message.get("role") in ("tool", "function") else ""
        yield FieldError(f"{where}.role", f"got {show(message.get('role'))}, {told}wanted one of {', '.join(ROLES)}")
    yield from _problems_of_content(message.get("content"), f"{where}.content")
    name = message.get("name")
    if name is not None and not (isinstance(name, str) and len(name) <= MAX_LABEL):
        yield FieldError(f"{where}.name", f"got {show(name)}, wanted a string of at most {MAX_LABEL} characters")
    for field in message.keys() - {"role", "content", "name"}:
        yield from _problems_of_other(field, message[field], where)


def _problems_of_content(content: object, where: str) -> Iterator[FieldError]:
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        yield FieldError(where, f"got {show(content)}, wanted {_CONTENT}")
        return
    if len(content) > MAX_PARTS:
        yield FieldError(where, f"got {len(content)} parts, wanted at most {MAX_PARTS}")
        return
    for place, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            got = part.get("type") if isinstance(part, dict) else part
            yield FieldError(f"{where}[{place}]", f"got {show(got)}, wanted a part of type text: not supported here")
        elif not isinstance(part.get("text"), str):
            yield FieldError(f"{where}[{place}].text", f"got {show(part.get('text'))}, wanted a string")
        elif len(part) > 2:
            more = next(name for name in part if name not in ("type", "text"))
            yield FieldError(f"{where}[{place}].{show_name(more)}", "unknown field")


def _problems_of_other(field: str, value: object, where: str) -> Iterator[FieldError]:
    other, told = NEUTRAL_OF_MESSAGES.get(field), f"{where}.{show_name(field)}"
    if value is None:
        return
    if other is None:
        yield FieldError(told, "unknown field")
    elif not other.takes(value):
        yield FieldError(told, f"got {show(value)}, wanted {other.wanted}: not supported here")
