"""Compiles grammars outside the engine's thread, and keeps the sequences that wait for them."""

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from twotower.constraints import Constraint
from twotower.decoding.steering import Matcher
from twotower.errors import InvalidRequest, TwoTowerError
from twotower.text.grammars import FIELD, Grammars


@dataclass(frozen=True, slots=True)
class _Waiting:
    matcher: Future[Matcher]
    go: Callable[[Matcher], None]
    fail: Callable[[TwoTowerError], None]


class Compiling:
    """`grammars`: None without a tokenizer. `wake`: called when the engine has work again."""

    def __init__(self, grammars: Grammars | None = None, wake: Callable[[], None] = lambda: None) -> None:
        self._grammars, self._wake = grammars, wake
        self._waiting: dict[Hashable, _Waiting] = {}
        self._thread: ThreadPoolExecutor | None = None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._waiting

    def prepare(self) -> None:
        """Before the first request: read the tokenizer."""
        if self._grammars is not None:
            self._grammars.prepare()

    def begin(
        self,
        key: Hashable,
        constraint: Constraint,
        go: Callable[[Matcher], None],
        fail: Callable[[TwoTowerError], None],
    ) -> None:
        """Compile; a later `take` calls `go` with the matcher, or `fail`."""
        if self._grammars is None:
            fail(InvalidRequest.of(FIELD, "not served here: this engine has no tokenizer"))
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "grammars")
        matcher: Future[Matcher] = self._thread.submit(self._grammars.matcher, constraint)
        self._waiting[key] = _Waiting(matcher, go, fail)
        matcher.add_done_callback(lambda _: self._wake())

    def drop(self, key: Hashable) -> None:
        """The sequence no longer waits."""
        waiting = self._waiting.pop(key, None)
        if waiting is not None:
            waiting.matcher.cancel()

    def drop_all(self, which: Callable[[Hashable], bool]) -> None:
        for key in list(filter(which, self._waiting)):
            self.drop(key)

    def take(self) -> None:
        """Continue the sequences whose grammar is compiled."""
        for key in [key for key, waiting in self._waiting.items() if waiting.matcher.done()]:
            waiting = self._waiting.pop(key)
            try:
                waiting.go(waiting.matcher.result())
            except TwoTowerError as error:
                waiting.fail(error)
