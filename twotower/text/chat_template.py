"""A checkpoint's chat template: a conversation in, the text of one prompt out.

The tokenizer library renders it, in jinja's sandbox. The template comes from the operator, the conversation from a
client. So a conversation that the template refuses, or that takes too long, is the client's mistake.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from twotower.errors import CheckpointError, InvalidRequest
from twotower.showing import one_line
from twotower.text.tokenizer import Tokenizer

RENDERED_S = 1.0  # at most
_PROBED_S = 10.0  # with all that is done once
_PROBE = ({"role": "user", "content": "a"},)

Message = Mapping[str, str]  # `role` and `content`, and `name` where its author has one


class _TooLong(Exception):
    """The template took too long."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, the last one to be answered."""

    messages: tuple[Message, ...]

    @property
    def texts(self) -> Iterator[str]:
        """All texts that the client wrote."""
        return (text for message in self.messages for text in message.values())


class ChatTemplate:
    """`source`: jinja, as the tokenizer library understands it."""

    def __init__(self, tokenizer: Tokenizer, source: str, whose: str) -> None:
        """`whose`: the template's name in errors. Raises CheckpointError."""
        self._tokenizer, self.source = tokenizer, source
        try:
            with _limited(_PROBED_S):
                tokenizer.rendered(source, _PROBE)
        except _TooLong as error:
            raise CheckpointError(f"{whose}: this chat template does not end within {_PROBED_S:g} s") from error
        except Exception as error:
            if any(
                kind.__name__ == "TemplateSyntaxError" for kind in type(error).__mro__
            ):  # any other error may be its refusal of the probe
                raise CheckpointError(f"{whose}: broken chat template: {one_line(str(error))}") from error

    def render(self, conversation: Conversation) -> str:
        """Raises InvalidRequest about `messages`."""
        try:
            with _limited(RENDERED_S):
                return self._tokenizer.rendered(self.source, conversation.messages)
        except _TooLong:
            told = f"the chat template takes more than {RENDERED_S:g} s for them"
        except Exception as error:
            told = f"the chat template does not take them: {one_line(str(error))}"
        raise InvalidRequest.of("messages", told)


def template_of(tokenizer: Tokenizer | None, directory: Path, given: str | None) -> ChatTemplate | None:
    """The `given` template, as text or as a file's path; else the checkpoint's own, if it has one. Raises
    CheckpointError.
    """
    if tokenizer is None:
        if given is not None:
            raise CheckpointError("model.chat_template: got one, but this checkpoint has no tokenizer")
        return None
    if given is None:
        own = tokenizer.chat_template
        return None if own is None else ChatTemplate(tokenizer, own, str(directory))
    return ChatTemplate(tokenizer, given if is_source(given) else _read(Path(given)), "model.chat_template")


def is_source(given: str) -> bool:
    """Whether it is a template's text and not a path."""
    return "{{" in given or "{%" in given


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"model.chat_template: {path}: cannot be read: {error}") from error


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Ends the thread's work inside the block once it has used so much processor time. It ends at a template's next
    line or the next call.
    """
    ends_at = time.thread_time() + seconds

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > ends_at:
            raise _TooLong
        return look if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)
