"""Incremental detokenization with stop strings, at a cost that is linear in the text."""

from collections.abc import Sequence

from twotower.text.stop_strings import Found, StopSearch
from twotower.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes, and so tokens, of a UTF-8 character
_MOST_OPEN = 2 * _LONGEST_CHARACTER  # tokens that wait for the end of a character


class AnswerText:
    """Tokens and text of a growing answer. A stop string ends it: its text before the string, its tokens with the one
    that completes the string. Without a tokenizer there is no text, and nothing to stop at.

    A stop string that is complete within the first `min_tokens` tokens does not end it. `offsets`: where each token's
    text begins in the whole text, including a stop string; only on request. `with_stop`: the text includes the stop
    string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: Sequence[str] = (),
        with_offsets: bool = False,
        with_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._stream = None if tokenizer is None else TextStream(tokenizer, stop, with_stop)
        self._with_offsets, self._min_tokens = with_offsets, min_tokens
        self._one_by_one = bool(stop) or with_offsets
        self.token_ids: list[int] = []
        self.offsets: list[int] = []

    @property
    def text(self) -> str | None:
        """All of the text, including the part that is not certain yet; None without a tokenizer."""
        return None if self._stream is None else self._stream.text

    @property
    def stopped(self) -> bool:
        return self._stream is not None and self._stream.stopped

    def push(self, token_ids: Sequence[int], last: bool = False) -> tuple[tuple[int, ...], str]:
        """Add tokens. Returns those that belong to the answer, and the text that became certain with them."""
        if self._stream is None:
            taken, new = list(token_ids), ""
            self.offsets += [0] * len(taken) if self._with_offsets else []
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
            if self._with_offsets:
                self.offsets.append(stream.settled)
            taken += part
            new += stream.push(part, stops=len(self.token_ids) + len(taken) >= self._min_tokens)
        return taken, new


class TextStream:
    """The text of one request as its tokens arrive.

    `push` returns the text that has become certain. It holds back text that a later token may still change (half a
    UTF-8 character), and the possible beginning of a stop string. After a stop string was found, `stopped` is True and
    the text ends before it, or `with_stop` behind it. `settled` counts the characters that no later token changes, also
    those that a stop string may cut off.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), with_stop: bool = False) -> None:
        self._growing, self._search, self._with_stop = _GrowingText(tokenizer), StopSearch(stop), with_stop
        self._certain: list[str] = []
        self._held = ""  # may be the beginning of a stop string
        self._open = ""  # may be half a character
        self.settled = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All of the text, including the part that is not certain yet."""
        return "".join(self._certain) + self._held + self._open

    def push(self, token_ids: Sequence[int], last: bool = False, stops: bool = True) -> str:
        """New text after these tokens; `last` releases everything that was held back. Without `stops`, a stop string
        that is complete by now does not end the text.
        """
        if self.stopped:
            return ""
        settled, self._open = self._growing.push(token_ids)
        if last:
            settled, self._open = settled + self._open, ""
        self.settled += len(settled)
        self._held += settled
        if stops:
            self._stop_at(self._search.push(settled))
        else:
            self._search.pass_over(settled)
        if stops and not self.stopped:
            whole = self._open.rstrip(_REPLACEMENT)
            self._stop_at(self._search.peek(whole), whole)
        return self._let_out(0 if last or self.stopped else self._search.begun)

    def _stop_at(self, found: Found | None, following: str = "") -> None:
        """End the text at the stop string that is `found` in what is held and `following`."""
        if found is not None:
            text = self._held + following
            end = len(text) - found.before_end + (len(found.text) if self._with_stop else 0)
            self._held = text[:end]
            self._open, self.stopped = "", True

    def _let_out(self, held: int) -> str:
        certain = len(self._held) - held
        new, self._held = self._held[:certain], self._held[certain:]
        self._certain.append(new)
        return new


class _GrowingText:
    """Text of a growing list of token ids, decoded a short window at a time.

    The window begins with the ids whose text was settled last. A tokenizer may treat the first id of a list specially:
    SentencePiece drops a space. After them come the open ids, which end in half a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._probe = tokenizer.encode_continuation("a")
        self._silent: dict[int, bool] = {}
        self._window: list[int] = []
        self._num_before = 0
        self._before = ""

    def push(self, token_ids: Sequence[int]) -> tuple[str, str]:
        """The text that these ids settle, and the open text after it."""
        self._window.extend(token_ids)
        whole = self._decode(self._window)
        found = self._whole_characters(whole)
        if found is None and self._drop_silent():
            found = self._whole_characters(whole)
        if found is None and len(self._window) - self._num_before > _MOST_OPEN:
            found = self._broken_characters(whole)
        if found is None:
            return "", whole[len(self._before) :]
        count, text = found
        settled = text[len(self._before) :]
        self._window = self._window[self._num_before :]
        self._num_before = count - self._num_before
        self._before = self._decode(self._window[: self._num_before])
        return settled, whole[len(text) :]

    def _whole_characters(self, whole: str) -> tuple[int, str] | None:
        """As many ids as end a character, and their text: a character is cut at most inside the last few."""
        least = max(self._num_before, len(self._window) - _LONGEST_CHARACTER)
        for count in range(len(self._window), least, -1):
            text = whole if count == len(self._window) else self._decode(self._window[:count])
            if len(text) > len(self._before) and not text.endswith(_REPLACEMENT):
                return count, text
        return None

    def _broken_characters(self, whole: str) -> tuple[int, str]:
        """How many ids to settle although they hold bytes that are no UTF-8, and their text.

        Bytes that are no UTF-8 stay so. The last three ids, or a few more, may yet become a character. A head that cuts
        a character has one U+FFFD for each byte of it. So among the heads that begin the whole text, the one with the
        fewest characters for its ids ends at the end of a character.
        """
        most = len(self._window) - (_LONGEST_CHARACTER - 1)
        counts = range(most, most - _LONGEST_CHARACTER, -1)
        heads = [(count, self._decode(self._window[:count])) for count in counts]
        if whole.startswith(self._before):
            begin = [head for head in heads if whole.startswith(head[1])]
        else:  # byte fallback makes a U+FFFD of every byte beside a broken one, of settled ones too
            begin = [head for head in heads if head[1].startswith(self._before)]
        return min(begin, key=lambda head: len(head[1]) - head[0], default=heads[0])

    def _drop_silent(self) -> bool:
        """Drop the open ids that never decode to text: special ones, and ids without a token."""
        opened = self._window[self._num_before :]
        for token in set(opened) - self._silent.keys():
            said = self._decode(self._probe)
            self._silent[token] = said != "" and self._decode([*self._probe, token]) == said
        self._window[self._num_before :] = [token for token in opened if not self._silent[token]]
        return len(self._window) < self._num_before + len(opened)
