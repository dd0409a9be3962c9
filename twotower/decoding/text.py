"""Token ids to text and back, and text as it grows: incremental detokenization with stop strings.

The only part of the library that knows a tokenizer. `transformers` is imported when one is first needed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from twotower.errors import CheckpointError, InvalidRequest

_REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """What we use of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens the tokenizer's own settings put there (a BOS, say)."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of these ids without special tokens."""
        ...


class PretrainedTokenizer:
    """The checkpoint directory's own tokenizer. Never runs remote code, never asks the network."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            if (directory / "tokenizer_config.json").exists():
                self._tokenizer = AutoTokenizer.from_pretrained(
                    str(directory), trust_remote_code=False, local_files_only=True
                )
            else:
                self._tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
        except Exception as error:
            raise CheckpointError(f"{directory}: cannot load the tokenizer: {error}") from error

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The directory's tokenizer, or None where it has none (token ids still work). Raises CheckpointError."""
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return PretrainedTokenizer(directory)


def require_tokenizer(tokenizer: Tokenizer | None, field: str) -> Tokenizer:
    """The tokenizer, or InvalidRequest on the field that needs one."""
    if tokenizer is None:
        raise InvalidRequest.of(field, "got text, but this checkpoint has no tokenizer; wanted prompt_token_ids")
    return tokenizer


class TextStream:
    """The text of one request as its tokens arrive.

    `push` returns the text that has become certain: nothing that a later token may still change (half a UTF-8
    character), and nothing that may be the beginning of a stop string. After a stop string was found, `stopped` is
    True and the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._token_ids: list[int] = []
        self._sent = 0
        self.text = ""
        self.stopped = False

    def push(self, token_ids: Sequence[int], last: bool = False) -> str:
        """New text after these tokens; `last` lets everything out that was held back."""
        if self.stopped:
            return ""
        self._token_ids.extend(token_ids)
        self.text = self._tokenizer.decode(self._token_ids)
        self._cut_at_stop()
        certain = len(self.text) if last or self.stopped else self._certain_length()
        new = self.text[self._sent : certain]
        self._sent = max(self._sent, certain)
        return new

    def _cut_at_stop(self) -> None:
        found = [at for at in (self.text.find(s, max(0, self._sent - len(s))) for s in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _certain_length(self) -> int:
        certain = len(self.text)
        while certain and self.text[certain - 1] == _REPLACEMENT:
            certain -= 1
        for stop in self._stop:
            for overlap in range(min(len(stop) - 1, certain), 0, -1):
                if self.text.endswith(stop[:overlap], 0, certain):
                    certain -= overlap
                    break
        return certain
