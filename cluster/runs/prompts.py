"""Between what clients send for a prompt and token ids: bounds first, then the tokenizer, in a thread if it is long."""

from collections.abc import Sequence
from functools import partial

from cluster.runs.deadline import Deadline
from cluster.runs.lanes import Lanes
from cluster.runs.served_model import ServedModel
from twotower.errors import InvalidRequest
from twotower.text.tokenizer import Tokenizer, require_tokenizer
from twotower.validation import check_bytes, check_part

Given = str | Sequence[object]  # text, or token ids
Part = str | tuple[int, ...]  # the same, checked
NO_PART: Part = ()  # where it is wrong, which is told

TOKENIZED_S = 1e-6  # a byte, about
_DECODED_S = 2e-6  # a token, about
_CHARACTERS_A_TOKEN = 4


class Prompts:
    """Of one checkpoint. `name`: of the field that is told where something is wrong."""

    def __init__(self, model: ServedModel, lanes: Lanes) -> None:
        self._model, self._limits, self._lanes = model, model.limits, lanes

    def checked(self, name: str, given: Given) -> Part:
        """The prompt, or the continuation of one. Text that cannot fit is refused before it is tokenized."""
        if not isinstance(given, str):
            return check_part(name, given, self._limits)
        return self._bounded(name, given) or check_part(name, (), self._limits)

    async def token_ids(self, name: str, part: Part, deadline: Deadline, special: bool = True) -> tuple[int, ...]:
        """Token ids of a checked part; of text with the tokenizer's `special` tokens. Raises InvalidRequest where there
        are too many."""
        return await self._encoded(name, part, deadline, special) if isinstance(part, str) else part

    async def tokenized(self, text: object, deadline: Deadline, special: bool) -> tuple[int, ...]:
        """As `token_ids`, of any text that a prompt may be, an empty one too."""
        return await self._encoded("prompt", self._bounded("prompt", text), deadline, special)

    async def tokens(self, token_ids: Sequence[int], deadline: Deadline) -> list[str]:
        """Each as the vocabulary writes it."""
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
    """In tokens, about: of text nobody knows yet how many it has."""
    return len(part) // _CHARACTERS_A_TOKEN if isinstance(part, str) else len(part)
