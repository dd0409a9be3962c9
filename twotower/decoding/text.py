"""Token ids to text and back, and text as it grows: incremental detokenization with stop strings.

The only part of the library that knows a tokenizer. `transformers` is imported when one is first needed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from twotower.errors import CheckpointError, InvalidRequest
from twotower.validation import check_text, parse_stop

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes, and so tokens, of a UTF-8 character


class Tokenizer(Protocol):
    """What we use of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens the tokenizer's own settings put there (a BOS, say)."""
        ...

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text that goes on after other tokens: without special tokens of its own."""
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
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{directory}: cannot load the tokenizer: {reason}") from error

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def encode_continuation(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The directory's tokenizer, or None where it has none (token ids still work). Raises CheckpointError."""
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    return PretrainedTokenizer(directory)


def require_tokenizer(tokenizer: Tokenizer | None, field: str) -> Tokenizer:
    """The tokenizer, or InvalidRequest on the field that needs one."""
    if tokenizer is None:
        raise InvalidRequest.of(field, "got text, but this checkpoint has no tokenizer; wanted token ids")
    return tokenizer


def encode_prompt(tokenizer: Tokenizer | None, text: object) -> list[int]:
    """Token ids of a prompt; none for an empty one. Raises InvalidRequest for no text, or no tokenizer."""
    able = require_tokenizer(tokenizer, "prompt")
    prompt = check_text("prompt", text)
    return able.encode(prompt) if prompt else []


def check_stop(tokenizer: Tokenizer | None, stop: object) -> tuple[str, ...]:
    """Stop strings: one, or a list of them. Raises InvalidRequest for wrong ones, or for any without a tokenizer."""
    strings = parse_stop(stop)
    if strings:
        require_tokenizer(tokenizer, "stop")
    return strings


class AnswerText:
    """Tokens and text of a growing answer. A stop string ends it: its text before the string, its tokens with the one
    that completes the string. Without a tokenizer there is no text, and nothing to stop at.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        self._stream = None if tokenizer is None else TextStream(tokenizer, stop)
        self._one_by_one = bool(stop)
        self.token_ids: list[int] = []

    @property
    def text(self) -> str | None:
        """All of it, what is not certain yet included; None without a tokenizer."""
        return None if self._stream is None else self._stream.text

    @property
    def stopped(self) -> bool:
        return self._stream is not None and self._stream.stopped

    def push(self, token_ids: Sequence[int], last: bool = False) -> tuple[tuple[int, ...], str]:
        """Those of the tokens that belong to the answer, and the text that became certain with them."""
        if self._stream is None:
            taken, new = list(token_ids), ""
        else:
            taken, new = self._push_text(self._stream, token_ids)
            new += self._stream.push((), last=True) if last else ""
        self.token_ids += taken
        return tuple(taken), new

    def _push_text(self, stream: "TextStream", token_ids: Sequence[int]) -> tuple[list[int], str]:
        parts = [[token] for token in token_ids] if self._one_by_one else [list(token_ids)]
        taken, new = list[int](), ""
        for part in parts:
            if stream.stopped:
                break
            new += stream.push(part)
            taken += part
        return taken, new


class TextStream:
    """The text of one request as its tokens arrive. Its cost is linear in the length of the text.

    `push` returns the text that has become certain: nothing that a later token may still change (half a UTF-8
    character), and nothing that may be the beginning of a stop string. After a stop string was found, `stopped` is
    True and the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._growing, self._stop = _GrowingText(tokenizer), tuple(stop)
        self._sent = 0
        self.text = ""
        self.stopped = False

    def push(self, token_ids: Sequence[int], last: bool = False) -> str:
        """New text after these tokens; `last` lets everything out that was held back."""
        if self.stopped:
            return ""
        tail = self._growing.push(token_ids)
        self.text = self._growing.settled + tail
        self._cut_at_stop()
        certain = len(self.text) if last or self.stopped else self._certain_length()
        new = self.text[self._sent : certain]
        self._sent = max(self._sent, certain)
        return new

    def _cut_at_stop(self) -> None:
        found = [at for at in (self.text.find(s, self._sent) for s in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _certain_length(self) -> int:
        whole = len(self.text.rstrip(_REPLACEMENT))
        return whole - max((_beginning(stop, self.text, whole) for stop in self._stop), default=0)


def _beginning(stop: str, text: str, end: int) -> int:
    """How many characters before `end` are the beginning of `stop`."""
    longest = min(len(stop) - 1, end)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size], 0, end)), 0)


class _GrowingText:
    """Text of a growing list of token ids, decoded a short window at a time.

    `settled` is the text of all ids up to one that ends a character. The window begins with the ids whose text was
    settled last, because a tokenizer may treat the first id it is given in its own way (SentencePiece drops a space).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._window: list[int] = []
        self._num_settled = 0
        self._before = ""
        self.settled = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that follows `settled`."""
        self._window.extend(token_ids)
        text = self._decode(self._window)
        tail, already = text[len(self._before) :], len(self.settled)
        self._settle(text)
        return tail[len(self.settled) - already :]

    def _settle(self, text: str) -> None:
        """Settle as many ids as end a character; a character is cut at most inside the last few."""
        least = max(self._num_settled, len(self._window) - _LONGEST_CHARACTER)
        for count in range(len(self._window), least, -1):
            text = text if count == len(self._window) else self._decode(self._window[:count])
            if len(text) > len(self._before) and not text.endswith(_REPLACEMENT):
                self.settled += text[len(self._before) :]
                self._window = self._window[self._num_settled :]
                self._num_settled = count - self._num_settled
                self._before = self._decode(self._window[: self._num_settled])
                return
