"""A checkpoint's tokenizer. The only part of the library that knows `transformers`, imported when first needed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from twotower.errors import CheckpointError, InvalidRequest
from twotower.text.token_bytes import bytes_per_token
from twotower.validation import check_bytes, parse_stop

_USUAL = ("PreTrainedTokenizerFast", "TokenizersBackend")  # the class's names before and since transformers 5


class Tokenizer(Protocol):
    """The parts of a tokenizer that we use."""

    @property
    def bytes_per_token(self) -> int:
        """Text of more than n times so many UTF-8 bytes has more than n tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens the tokenizer's own settings put there (a BOS, say)."""
        ...

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text that continues other tokens: without special tokens."""
        ...

    def decode(self, token_ids: Sequence[int], with_special: bool = False) -> str:
        """Text of these ids, without special tokens unless they are wanted."""
        ...

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it, which is not its text: a space may be `Ġ`."""
        ...

    @property
    def described(self) -> Mapping[str, object]:
        """The content of tokenizer_config.json, with the class and the special tokens by role; JSON values."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's own chat template."""
        ...

    def rendered(self, template: str, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt that a chat template renders from messages, up to the answer's begin. Raises the template's
        errors.
        """
        ...


class PretrainedTokenizer:
    """The checkpoint directory's own tokenizer. Never runs remote code, never asks the network.

    The model's config.json is not used: transformers refuses some that our own reader accepts.
    """

    def __init__(self, directory: Path) -> None:
        try:
            self._told = _told(directory)
            self._tokenizer = _load(directory, self._told)
            self.bytes_per_token = bytes_per_token(self._tokenizer)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{directory}: cannot load the tokenizer: {reason}") from error

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def encode_continuation(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int], with_special: bool = False) -> str:
        ids, skip = list(token_ids), not with_special
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        return [token or "" for token in self._tokenizer.convert_ids_to_tokens(list(token_ids))]

    @property
    def described(self) -> Mapping[str, object]:
        own = {"tokenizer_class": type(self._tokenizer).__name__}
        return {**own, **(self._told or {}), **self._tokenizer.special_tokens_map}

    @property
    def chat_template(self) -> str | None:
        own = self._tokenizer.chat_template  # of several named templates: the one for chats without tools
        return own.get("default") if isinstance(own, Mapping) else own

    def rendered(self, template: str, messages: Sequence[Mapping[str, str]]) -> str:
        chat = [dict(message) for message in messages]
        made = self._tokenizer.apply_chat_template(
            chat, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        return str(made)


def _told(directory: Path) -> dict[str, object] | None:
    """The directory's tokenizer_config.json, if there is one."""
    config = directory / "tokenizer_config.json"
    return dict(json.loads(config.read_text(encoding="utf-8"))) if config.exists() else None


def _load(directory: Path, told: Mapping[str, object] | None) -> Any:
    # The usual class by its name: it needs no torch, which transformers' choice among all classes imports.
    from transformers import PreTrainedTokenizerFast

    if told is None:
        return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    if told.get("tokenizer_class") in _USUAL:
        return PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)

    from transformers import AutoTokenizer, PretrainedConfig

    return AutoTokenizer.from_pretrained(
        str(directory), config=PretrainedConfig(), trust_remote_code=False, local_files_only=True
    )


def around_text(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The special tokens that it adds before and after a prompt's text, such as a BOS, as the vocabulary
    writes them.
    """
    whole, text = tokenizer.tokens(tokenizer.encode("a")), tokenizer.tokens(tokenizer.encode_continuation("a"))
    start = next(place for place in range(len(whole)) if whole[place : place + len(text)] == text)
    return whole[:start], whole[start + len(text) :]


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The directory's tokenizer, or None if it has none (token ids still work). Raises CheckpointError."""
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return PretrainedTokenizer(directory)


def require_tokenizer(tokenizer: Tokenizer | None, field: str) -> Tokenizer:
    """The tokenizer, or InvalidRequest on the field that needs one."""
    if tokenizer is None:
        raise InvalidRequest.of(field, "got text, but this checkpoint has no tokenizer; wanted token ids")
    return tokenizer


def encode_prompt(tokenizer: Tokenizer | None, text: object, most: int) -> list[int]:
    """Token ids of a prompt; none for an empty one. Raises InvalidRequest for no text, no tokenizer, or text that
    cannot have as few as `most` tokens.
    """
    able = require_tokenizer(tokenizer, "prompt")
    prompt = check_bytes("prompt", text, most, able.bytes_per_token)
    return able.encode(prompt) if prompt else []


def check_stop(tokenizer: Tokenizer | None, stop: object) -> tuple[str, ...]:
    """Stop strings: one, or a list of them. Raises InvalidRequest for wrong ones, or for any without a tokenizer."""
    strings = parse_stop(stop)
    if strings:
        require_tokenizer(tokenizer, "stop")
    return strings
