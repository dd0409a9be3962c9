"""The sequences that the context tower reads: the one owner of their slots, and so of their pages and states.

Knows who each belongs to and what it still has to read; does not know why it is read.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from twotower.engine.passes import Passes, Want
from twotower.engine.prefixes import Found, Prefixes
from twotower.engine.scheduler import ContextScheduler, Key, PrefillChunk
from twotower.engine.sharing import HeldInCommon, SharedRoom, prefix_names
from twotower.engine.steps import Step
from twotower.model.cache import TowerCache
from twotower.model.rescan import KeptScans
from twotower.model.room import Room


@dataclass(frozen=True, slots=True)
class ReadChunk:
    """A chunk that row `row` of a forward has read. `last`: with it the whole prompt is read."""

    row: int
    chunk: PrefillChunk
    last: bool


class Owner(Protocol):
    """Who opens sequences, and goes on with them as their prompts are read."""

    def has_opened(self, key: Key, found: Sequence[PrefillChunk], whole: bool) -> None:
        """The sequence has its slot, and these chunks of its prompt are there already. `whole`: the prompt is empty."""
        ...

    def wants_hidden(self, last: bool) -> bool:
        """Whether anything follows from a chunk's hidden states."""
        ...

    def has_read(self, chunks: Sequence[ReadChunk], hidden_RLD: Tensor) -> Step[None] | None:
        """These chunks of the owner's prompts are in the cache. May launch a step, without waiting for it."""
        ...


_UNOPENED = -1  # the slot of a sequence that has none yet


class _Needs(NamedTuple):
    """Of a sequence that waits for its slot: the positions it may fill, how many of its prefixes it can do without
    reading, and where its prompt ends."""

    positions: int
    usable: int
    length: int


@dataclass(slots=True)
class ContextSequence:
    """`to_read`: the rest of the prompt, a block, or the newest token. `names`: of its prompt's prefixes. `promised`:
    its part of the room, whether it has a slot yet or not."""

    owner: Owner
    slot: int
    to_read: list[int]
    names: tuple[bytes, ...]
    promised: HeldInCommon


class Sequences:
    """All of them, by key. Each reads what it has been given when the scheduler says so.

    A sequence gets its slot when `begin` is called next, in the order of `open`. It waits while another one reads what
    both begin with, and while prefixes that were to be shared take room twice. What is waited for goes on by itself.
    """

    def __init__(
        self, cache: TowerCache, passes: Passes, scheduler: ContextScheduler, prefixes: Prefixes, chunk: int
    ) -> None:
        """`chunk`: positions of a prompt that are read at once."""
        self._cache, self._passes, self._scheduler = cache, passes, scheduler
        self._prefixes, self._chunk = prefixes, chunk
        room = Room(cache.room.slots, cache.room.pages, page_tokens=cache.page_tokens)
        self._room = SharedRoom(room, prefixes.stride)
        self._by_key: dict[Key, ContextSequence] = {}
        self._unopened: dict[Key, _Needs] = {}
        self._coming: dict[bytes, Key] = {}  # prefixes that are being read, and by which sequence
        self._stirred = False
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
        slot = self._by_key[key].slot
        return 0 if slot == _UNOPENED else self._cache.length(slot)

    def open(
        self,
        key: Key,
        owner: Owner,
        prompt: Sequence[int],
        positions: int,
        salt: str = "",
        decided_from: int | None = None,
    ) -> None:
        """Read `prompt`, in chunks; room for `positions`. Raises Overloaded where there is none.

        `salt`: whose prefixes it shares. `decided_from`: the first position from whose reading something follows, so
        that it must be read here; None: the prompt's last.
        """
        first = max(0, len(prompt) - 1) if decided_from is None else decided_from
        names = prefix_names(prompt, self._prefixes.stride, salt)
        usable = first // self._prefixes.stride if names else 0
        promised = self._room.take(positions, names[:usable])
        self._by_key[key] = ContextSequence(owner, _UNOPENED, list(prompt), names, promised)
        self._unopened[key] = _Needs(positions, usable, len(prompt))
        self._stirred = True

    def begin(self) -> None:
        """Give slots to those that wait for one and can have it."""
        if not self._stirred:
            return
        self._stirred, awaited = False, dict[Key, int]()
        for key, needs in list(self._unopened.items()):
            names = self._by_key[key].names[: needs.usable]
            found = self._prefixes.find(names)
            reader = self._reader_of(names, found)
            if reader is not None:
                left = needs.length - found.positions
                awaited[reader] = min(left, awaited.get(reader, left))
            elif self._cache.room.fits(needs.positions, found.pages):
                self._begin(key, needs, found)
            else:
                break  # those behind it would keep it waiting
        self._scheduler.await_prompts(awaited)

    def _reader_of(self, names: Sequence[bytes], found: Found) -> Key | None:
        """Who is reading what this one would read next."""
        strides = found.positions // self._prefixes.stride if names else 0
        return self._coming.get(names[strides]) if strides < len(names) else None

    def _begin(self, key: Key, needs: _Needs, found: Found) -> None:
        del self._unopened[key]
        sequence = self._by_key[key]
        sequence.slot = self._cache.allocate(needs.positions, found.pages, found.snapshot)
        if needs.usable:
            self._prefixes.used(sequence.names, found)
        del sequence.to_read[: found.positions]
        for name in sequence.names:
            if name not in self._prefixes:
                self._coming.setdefault(name, key)
        if sequence.to_read:
            self._scheduler.add_prompt(key, found.positions, needs.length)
        starts = range(0, found.positions, self._chunk)
        chunks = [PrefillChunk(key, start, start + self._chunk) for start in starts]
        sequence.owner.has_opened(key, chunks, not needs.length)

    def doubt(self, key: Key) -> None:
        """Its numbers are not finite: nothing of its prompt is kept for others."""
        self._prefixes.forget(self._by_key[key].names)

    def keep(self, chunk: PrefillChunk) -> None:
        """A chunk of this prompt has just been read: where a prefix ends with it, others may go on behind it."""
        stride, sequence = self._prefixes.stride, self._by_key[chunk.key]
        if not stride or chunk.end % stride:
            return
        names = sequence.names[: chunk.end // stride]
        self._prefixes.keep(names, sequence.slot)
        self._comes_no_more(names[-1:], chunk.key)

    def _comes_no_more(self, names: Sequence[bytes], key: Key) -> None:
        for name in names:
            if self._coming.get(name) == key:
                del self._coming[name]
        self._stirred = True

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
        self._unopened.pop(key, None)
        sequence = self._by_key.pop(key)
        if sequence.slot != _UNOPENED:
            self._cache.free(sequence.slot)
        self._room.give(sequence.promised)
        self._comes_no_more(sequence.names, key)

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
