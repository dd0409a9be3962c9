"""Structured output: from what a request wants its text to be, to which tokens may come next.

The only part of the library that knows `llguidance`, imported when first needed. It compiles nothing ahead: a state of
the automaton is worked out when a text reaches it, within bounds on its work (its "fuel"), whatever the grammar.
"""

import json
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from twotower.constraints import Constraint
from twotower.errors import InvalidRequest
from twotower.showing import one_line

FIELD = "structured_outputs"
_KEPT = 32  # compiled grammars, those that were asked for last
_MOST_STATES = 16_384  # of a grammar's lexer, of 1 to 2 kB each
_LONGEST_REASON = 300
_META = frozenset(r"\.+*?()|[]{}^$#&-~/")


class Grammars:
    """Those of one checkpoint's tokenizer. From any thread."""

    def __init__(self, directory: Path, vocab_size: int, eos_token_id: int) -> None:
        self._directory, self._vocab_size, self._eos = directory, vocab_size, eos_token_id
        self._compiled: dict[Constraint, Any] = {}
        self._lock = threading.Lock()

    def __contains__(self, constraint: Constraint) -> bool:
        """Whether it is compiled."""
        return constraint in self._compiled

    def matcher(self, constraint: Constraint) -> "TextMatcher":
        """One at the beginning of the text. Takes up to some seconds for a grammar that was not asked for lately.

        Raises InvalidRequest for one that cannot be compiled, and where nothing can be.
        """
        with self._lock:
            compiled = self._compiled.pop(constraint, None)
        if compiled is None:
            compiled = self._compile(constraint)
        with self._lock:
            self._compiled[constraint] = compiled
            if len(self._compiled) > _KEPT:
                del self._compiled[next(iter(self._compiled))]
        return TextMatcher(compiled.deep_copy())

    def _compile(self, constraint: Constraint) -> Any:
        tokenizer = self._tokenizer
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=_MOST_STATES, verbose_errors=False)
        try:
            compiled = LLMatcher(tokenizer, _source(constraint), log_level=0, limits=limits)
        except ValueError as error:
            raise _refused(f"{constraint.kind}: {error}") from None
        if compiled.is_error():
            raise _refused(f"{constraint.kind}: {compiled.get_error()}")
        return compiled

    @cached_property
    def _tokenizer(self) -> Any:
        """Raises InvalidRequest."""
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise _refused("not served here: the package llguidance is missing") from None
        path = self._directory / "tokenizer.json"
        if not path.exists():
            raise _refused("not served here: the checkpoint has no tokenizer.json")
        try:
            return LLTokenizer(path.read_text(encoding="utf-8"), n_vocab=self._vocab_size, eos_token=self._eos)
        except (ValueError, OSError) as error:
            raise _refused(
                f"not served here: the checkpoint's tokenizer cannot be followed byte by byte: {error}"
            ) from None


class TextMatcher:
    """How far one text is. `fault`: why it cannot go on, once it cannot."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def fault(self) -> str | None:
        return one_line(self._matcher.get_error())[:_LONGEST_REASON] if self._matcher.is_error() else None

    def follow(self, tokens: Sequence[int]) -> None:
        """The text goes on with these."""
        self._matcher.consume_tokens(list(tokens))

    def masks(self, draft: Sequence[int], first: int, count: int) -> list[bytes]:
        """Which tokens may come behind each of `count` beginnings of the draft, from that of `first` tokens on: a bit
        for each, the lowest of the first byte that of token 0. Where a beginning breaks the grammar, as behind the last
        one that does not: nothing that follows it will stand."""
        followed = self._matcher.try_consume_tokens(list(draft[:first]))
        alive, masks = followed == first, [self._matcher.compute_bitmask()]
        for token in draft[first : first + count - 1]:
            alive = alive and self._matcher.try_consume_tokens([token]) == 1
            followed += alive
            masks.append(self._matcher.compute_bitmask() if alive else masks[-1])
        self._matcher.rollback(followed)
        return masks


def _source(constraint: Constraint) -> str:
    """As llguidance takes it. Raises ValueError."""
    from llguidance import LLMatcher

    match constraint.kind:
        case "json":
            return str(LLMatcher.grammar_from_json_schema(constraint.text))
        case "json_object":
            return str(LLMatcher.grammar_from_json_schema('{"type": "object"}'))
        case "regex":
            return str(LLMatcher.grammar_from_regex(constraint.text))
        case "choice":
            return str(LLMatcher.grammar_from_regex("|".join(map(_literally, json.loads(constraint.text)))))
        case _:
            return str(LLMatcher.grammar_from_lark(constraint.text))


def _literally(text: str) -> str:
    return "".join(f"\\{character}" if character in _META else character for character in text)


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest.of(FIELD, one_line(why)[:_LONGEST_REASON])
