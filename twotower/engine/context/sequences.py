"""The sequences that the context tower reads: the one owner of their slots, and so of their pages and states.

Knows who each belongs to and what it still has to read; does not know why it is read.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from twotower.engine.passes import Passes, Want
from twotower.engine.scheduler import ContextScheduler, Key, PrefillChunk
from twotower.engine.steps import Step
from twotower.model.cache import TowerCache
from twotower.model.rescan import KeptScans


@dataclass(frozen=True, slots=True)
class ReadChunk:
    """A chunk that row `row` of a forward has read. `last`: with it the whole prompt is read."""

    row: int
    chunk: PrefillChunk
    last: bool


class Owner(Protocol):
    """Who opens sequences, and goes on with them as their prompts are read."""

    def wants_hidden(self, last: bool) -> bool:
        """Whether anything follows from a chunk's hidden states."""
        ...

    def has_read(self, chunks: Sequence[ReadChunk], hidden_RLD: Tensor) -> Step[None] | None:
        """These chunks of the owner's prompts are in the cache. May launch a step, without waiting for it."""
        ...


@dataclass(slots=True)
class ContextSequence:
    """`to_read`: the rest of the prompt, a block, or the newest token."""

    owner: Owner
    slot: int
    to_read: list[int]


class Sequences:
    """All of them, by key. Each reads what it has been given when the scheduler says so."""

    def __init__(self, cache: TowerCache, passes: Passes, scheduler: ContextScheduler) -> None:
        self._cache, self._passes, self._scheduler = cache, passes, scheduler
        self._by_key: dict[Key, ContextSequence] = {}
        self.rows = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Key]:
        return iter(list(self._by_key))

    def __contains__(self, key: Key) -> bool:
        return key in self._by_key

    def __getitem__(self, key: Key) -> ContextSequence:
        return self._by_key[key]

    def length(self, key: Key) -> int:
        """Tokens read."""
        return self._cache.length(self._by_key[key].slot)

    def open(self, key: Key, owner: Owner, prompt: Sequence[int], positions: int) -> None:
        """Read `prompt`, in chunks; room for `positions`. Raises Overloaded where there is none."""
        self._by_key[key] = ContextSequence(owner, self._cache.allocate(positions), list(prompt))
        if prompt:
            self._scheduler.add_prompt(key, 0, len(prompt))

    def commit(self, key: Key, block: Sequence[int]) -> None:
        """Read this block next."""
        self._by_key[key].to_read = list(block)
        self._scheduler.add_commit(key, len(block))

    def decode(self, key: Key, token: int) -> None:
        """Read this token next, for the one that follows."""
        self._by_key[key].to_read = [token]
        self._scheduler.add_decoding(key)

    def pause(self, key: Key) -> None:
        """It decodes no more for now; its newest token is not read."""
        self._scheduler.drop(key)
        self._by_key[key].to_read = []

    def close(self, key: Key) -> None:
        """Its slot may be another's at once: no pass that writes there may be under way (`Prompts.finish`)."""
        self._scheduler.drop(key)
        self._cache.free(self._by_key.pop(key).slot)

    def read(self, keys: Sequence[Key], want: Want) -> Tensor:
        """One forward over all that these have to read. Returns what `Passes.run` does."""
        tokens = [self._by_key[key].to_read for key in keys]
        out = self._passes.run([self._by_key[key].slot for key in keys], tokens, want=want)
        self.have_read(zip(keys, map(len, tokens), strict=True))
        return out

    def verify(self, keys: Sequence[Key]) -> tuple[list[list[int]], Tensor, KeptScans | None]:
        """One forward over the blocks that these have to read, without moving on. Returns the blocks, and what
        `Passes.verify` does."""
        blocks = [self._by_key[key].to_read for key in keys]
        return blocks, *self._passes.verify([self._by_key[key].slot for key in keys], blocks)

    def settle(self, keys: Sequence[Key], scans: KeptScans | None, cuts: Sequence[int]) -> None:
        """Of each block the first so many tokens have been read. The rest is forgotten."""
        sequences = [self._by_key[key] for key in keys]
        self._cache.settle([sequence.slot for sequence in sequences], scans, cuts)
        for sequence in sequences:
            sequence.to_read = []
            self.rows += 1

    def have_read(self, counts: Iterable[tuple[Key, int]]) -> None:
        """A forward has extended the states by so many tokens."""
        for key, count in counts:
            sequence = self._by_key[key]
            self._cache.advance(sequence.slot, count)
            del sequence.to_read[:count]
            self.rows += 1
