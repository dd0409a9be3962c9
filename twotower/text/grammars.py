"""Structured output: from a request's description of its text to the tokens that may come next.

The only part of the library that knows `llguidance`, imported when first needed. llguidance compiles nothing ahead. It
computes a state of the automaton when a text reaches it, within bounds on its work (its "fuel"). Exceeding a bound
breaks the automaton and all copies of it, so each request has its own.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twotower.constraints import Constraint
from twotower.errors import InvalidRequest
from twotower.showing import one_line

FIELD = "structured_outputs"
_KEPT = 32  # checked descriptions, the most recently used ones
_MOST_STATES = 16_384  # states of a grammar's lexer, 1 to 2 kB each
# The library's default is 1,000,000, with which a first mask can take seconds. With this it takes 20 ms.
_FUEL_AT_FIRST = 100_000
_LONGEST_COMPILE_S = 1.0  # seconds of a CPU, including the first mask
_LONGEST_MASK_S = 0.1  # seconds of a CPU: other sequences wait meanwhile
_TOO_COMPLEX = "too complex: {what} took more than {bound:g} s of a CPU"
_NO_TOKEN = "no token of this tokenizer may come next"
_LONGEST_REASON = 300
_META = frozenset(r"\.+*?()|[]{}^$#&-~/")

logger = logging.getLogger(__name__)


class Grammars:
    """The grammars over one checkpoint's tokenizer. From any thread."""

    def __init__(self, directory: Path, vocab_size: int, eos_token_id: int) -> None:
        self._directory, self._vocab_size, self._eos = directory, vocab_size, eos_token_id
        self._sources: dict[Constraint, str] = {}
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._read: Any = None  # the tokenizer, once it is read
        self._refusal: str | None = None

    def __contains__(self, constraint: Constraint) -> bool:
        """Whether the description has been checked."""
        return constraint in self._sources

    def prepare(self) -> None:
        """Read the tokenizer. With 131,072 tokens this blocks the whole process for about a second, so it is done
        before serving.
        """
        try:
            self._tokenizer()
        except InvalidRequest as refusal:
            logger.info("%s", refusal)

    def matcher(self, constraint: Constraint) -> "TextMatcher":
        """A new matcher at the beginning of the text, which shares nothing with others. Takes some milliseconds, at
        most a second.

        Raises InvalidRequest for a description that cannot be compiled, and if no description can be.
        """
        with _named(f"{constraint.kind}: cannot be compiled"):
            return self._matcher(constraint)

    def _matcher(self, constraint: Constraint) -> "TextMatcher":
        tokenizer, started = self._tokenizer(), time.thread_time()
        try:
            source = self._sources.get(constraint) or _source(constraint)
            matcher, drafter = _automaton(tokenizer, source), _automaton(tokenizer, source)
        except ValueError as error:
            raise _refused(f"{constraint.kind}: {error}") from None
        mask = matcher.compute_bitmask()
        if matcher.is_error() or not any(mask):
            raise _refused(f"{constraint.kind}: {_error_of(matcher) or _NO_TOKEN}")
        if time.thread_time() - started > _LONGEST_COMPILE_S:
            too_complex = _TOO_COMPLEX.format(what="its compilation", bound=_LONGEST_COMPILE_S)
            raise _refused(f"{constraint.kind}: {too_complex}")
        self._keep(constraint, source)
        return TextMatcher(matcher, drafter, mask)

    def _keep(self, constraint: Constraint, source: str) -> None:
        with self._lock:
            self._sources.pop(constraint, None)
            self._sources[constraint] = source
            if len(self._sources) > _KEPT:
                del self._sources[next(iter(self._sources))]

    def _tokenizer(self) -> Any:
        """The tokenizer, read once; a failure is also kept. Raises InvalidRequest."""
        with self._reading:
            if self._read is None and self._refusal is None:
                try:
                    with _named("not served here: the checkpoint's tokenizer"):
                        self._read = self._read_tokenizer()
                except InvalidRequest as refusal:
                    self._refusal = refusal.problems[0].message
        if self._refusal is not None:
            raise _refused(self._refusal)
        return self._read

    def _read_tokenizer(self) -> Any:
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
    """The state of one text under a grammar. `fault`: the reason once no token may follow.

    A second automaton, `drafter`, also follows the text, and copies of it follow drafts. Copies share the automaton's
    remaining budget and its error. So a draft can break `drafter`, but never `matcher`.
    """

    def __init__(self, matcher: Any, drafter: Any, mask: bytes) -> None:
        """`mask`: the first one."""
        self._matcher, self._drafter = matcher, drafter
        self._mask: bytes | None = mask  # the mask after the text so far, once it is known
        self._nothing, self._slow, self._drafts = bytes(len(mask)), False, True

    @property
    def fault(self) -> str | None:
        if self._mask == self._nothing and not self._matcher.is_error():
            return _NO_TOKEN
        if self._slow:
            return _TOO_COMPLEX.format(what="a mask", bound=_LONGEST_MASK_S)
        return _error_of(self._matcher)[:_LONGEST_REASON] if self._matcher.is_error() else None

    def follow(self, tokens: Sequence[int]) -> None:
        """The text goes on with these."""
        if tokens:
            self._mask = None
            self._matcher.consume_tokens(list(tokens))
            self._drafter.consume_tokens(list(tokens))

    def masks(self, draft: Sequence[int], first: int, count: int) -> list[bytes]:
        """The allowed tokens after each of `count` prefixes of the draft, from the one of `first` tokens on. One bit
        for each token; token 0 has the lowest bit of the first byte. No token is allowed after a prefix that breaks the
        grammar or cannot be followed: the draft is accepted up to there at most.
        """
        own = [] if first else [self._next()]
        return own + self._ahead(draft, max(first, 1), count - len(own)) if count > len(own) else own

    def _next(self) -> bytes:
        if self._mask is None:
            started = time.thread_time()
            self._mask = bytes(self._matcher.compute_bitmask())
            self._slow = self._slow or time.thread_time() - started > _LONGEST_MASK_S
        return self._mask

    def _ahead(self, draft: Sequence[int], first: int, count: int) -> list[bytes]:
        copy, steps = self._drafter.deep_copy(), [draft[:first], *([token] for token in draft[first:])]
        masks = list[bytes]()
        for step in steps[:count]:
            started = time.thread_time()
            if not self._drafts or copy.try_consume_tokens(list(step)) < len(step):
                break
            mask = copy.compute_bitmask()
            self._drafts = time.thread_time() - started <= _LONGEST_MASK_S
            if copy.is_error():
                break
            masks.append(mask)
        return masks + [self._nothing] * (count - len(masks))


def _automaton(tokenizer: Any, source: str) -> Any:
    """Raises ValueError."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(initial_lexer_fuel=_FUEL_AT_FIRST, max_lexer_states=_MOST_STATES, verbose_errors=False)
    automaton = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if automaton.is_error():
        raise ValueError(_error_of(automaton))
    return automaton


def _error_of(automaton: Any) -> str:
    error = automaton.get_error().removesuffix("<non-verbose/>").strip()
    return _NO_TOKEN if error == "NoExtensionBias" else one_line(error)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Turns the library's errors into the request's refusal, also a panic, which is no Exception."""
    try:
        yield
    except (InvalidRequest, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise _refused(f"{what}: {type(error).__name__}: {error}") from error


def _source(constraint: Constraint) -> str:
    """The description in llguidance's form. Raises ValueError."""
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
