"""From a client's prompt to token ids: first the bounds, then the tokenizer, in a thread if the text is long."""

from collections.abc import Sequence
from functools import partial

from cluster.runs.deadline import Deadline
from cluster.runs.lanes import Lanes
from cluster.runs.served_model import ServedModel
from twotower.errors import InvalidRequest
from twotower.text.chat_template import ChatTemplate, Conversation
from twotower.text.tokenizer import Tokenizer, require_tokenizer
from twotower.validation import check_bytes, check_part

Given = str | Conversation | Sequence[object]  # text, a chat, or token ids
Part = str | Conversation | tuple[int, ...]  # the same, checked
NO_PART: Part = ()  # wrong, with the error

TOKENIZED_S = 1e-6  # seconds a byte, about
_DECODED_S = 2e-6  # seconds a token, about
_RENDERED_S, _RENDERED_MESSAGE_S = 0.005, 6e-5  # a chat: always in a thread, since a template may take long
_CHARACTERS_A_TOKEN = 4
NO_TEMPLATE = "this checkpoint has no chat template: set model.chat_template to one, or use /v1/completions"


class Prompts:
    """Prompts for one checkpoint. `name`: the field's name in errors."""

    def __init__(self, model: ServedModel, lanes: Lanes) -> None:
        self._model, self._limits, self._lanes = model, model.limits, lanes

    def checked(self, name: str, given: Given) -> Part:
        """The prompt or continuation, checked. Text that cannot fit is refused before it is tokenized. A chat's
        rendered length is not known yet: its template may leave out most of the messages.
        """
        if isinstance(given, Conversation):
            self._template()
            return given
        if not isinstance(given, str):
            return check_part(name, given, self._limits)
        return self._bounded(name, given) or check_part(name, (), self._limits)

    async def token_ids(self, name: str, part: Part, deadline: Deadline, special: bool = True) -> tuple[int, ...]:
        """Token ids of a checked part; for text with the tokenizer's `special` tokens. Raises InvalidRequest for too
        many, or for none: a template may render nothing.
        """
        if isinstance(part, Conversation):
            part = self._bounded(name, await self._rendered(part, deadline))
        token_ids = await self._encoded(name, part, deadline, special) if isinstance(part, str) else part
        return token_ids or check_part(name, (), self._limits)

    async def tokenized(self, given: str | Conversation, deadline: Deadline, special: bool) -> tuple[int, ...]:
        """As `token_ids`, for any text or chat, also an empty text."""
        text = await self._rendered(given, deadline) if isinstance(given, Conversation) else given
        return await self._encoded("prompt", self._bounded("prompt", text), deadline, special)

    async def tokens(self, token_ids: Sequence[int], deadline: Deadline) -> list[str]:
        """Each token as the vocabulary writes it."""
        tokenizer = self._tokenizer("prompt")
        return await self._lanes.run(len(token_ids) * _DECODED_S, partial(tokenizer.tokens, token_ids), deadline)

    async def detokenized(self, given: Sequence[object], deadline: Deadline) -> str:
        """The text of these ids, special tokens written out. Raises InvalidRequest."""
        tokenizer = self._model.tokenizer
        if tokenizer is None:
            raise InvalidRequest.of("prompt", "this checkpoint has no tokenizer")
        token_ids = check_part("prompt", given, self._limits) if len(given) else ()
        decode = partial(tokenizer.decode, token_ids, with_special=True)
        return await self._lanes.run(len(token_ids) * _DECODED_S, decode, deadline)

    def _template(self) -> ChatTemplate:
        """Raises InvalidRequest."""
        template = self._model.chat_template
        if template is None:
            raise InvalidRequest.of("messages", NO_TEMPLATE)
        return template

    async def _rendered(self, chat: Conversation, deadline: Deadline) -> str:
        expected_s = _RENDERED_S + len(chat.messages) * _RENDERED_MESSAGE_S
        return await self._lanes.run(expected_s, partial(self._template().render, chat), deadline)

    async def _encoded(self, name: str, text: str, deadline: Deadline, special: bool) -> tuple[int, ...]:
        tokenizer = self._tokenizer(name)
        encode = tokenizer.encode if special else tokenizer.encode_continuation
        token_ids = await self._lanes.run(len(text.encode()) * TOKENIZED_S, partial(encode, text), deadline)
        return check_part(name, token_ids, self._limits) if token_ids or text else ()

    def _bounded(self, name: str, text: object) -> str:
        longest, tokenizer = self._limits.max_sequence_length, self._tokenizer(name)
        return check_bytes(name, text, longest, tokenizer.bytes_per_token)

    def _tokenizer(self, name: str) -> Tokenizer:
        return require_tokenizer(self._model.tokenizer, name)


def length_of(part: Part) -> int:
    """The length in tokens; for text an estimate."""
    if isinstance(part, Conversation):
        return sum(map(len, part.texts)) // _CHARACTERS_A_TOKEN
    return len(part) // _CHARACTERS_A_TOKEN if isinstance(part, str) else len(part)
