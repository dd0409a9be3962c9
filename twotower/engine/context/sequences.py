"""The sequences that the context tower reads. Owns their slots, and so their pages and states.

Knows each sequence's owner and unread tokens; does not know why they are read.
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
    """A chunk that row `row` of a forward has read. `last`: whether it ends the prompt."""

    row: int
    chunk: PrefillChunk
    last: bool


class Owner(Protocol):
    """Opens sequences and continues them as their prompts are read."""

    def has_opened(self, key: Key, found: Sequence[PrefillChunk], whole: bool) -> None:
        """The sequence has its slot, and these chunks of its prompt are in the cache already. `whole`: the prompt is
        empty.
        """
        ...

    def wants_hidden(self, last: bool) -> bool:
        """Whether a chunk's hidden states are needed."""
        ...

    def has_read(self, chunks: Sequence[ReadChunk], hidden_RLD: Tensor) -> Step[None] | None:
        """These chunks of the owner's prompts are in the cache. May launch a step, without waiting for it."""
        ...


_UNOPENED = -1  # the slot of a sequence that has none yet


class _Needs(NamedTuple):
    """The needs of a sequence that waits for its slot: the positions it may fill, the prefixes that need not be read,
    the prompt's end.
    """

    positions: int
    usable: int
    length: int


@dataclass(slots=True)
class ContextSequence:
    """`to_read`: the rest of the prompt, a block, or the newest token. `names`: the names of its prompt's prefixes.
    `promised`: its part of the room, also before it has a slot.
    """

    owner: Owner
    slot: int
    to_read: list[int]
    names: tuple[bytes, ...]
    promised: HeldInCommon


class Sequences:
    """All sequences, by key. Each reads its given tokens when the scheduler says so.

    A sequence gets its slot at the next `begin`, in the order of `open`. It waits while another sequence reads their
    common prefix, and while prefixes that should be shared take room twice. It never waits for a sequence that is
    itself waiting.
    """

    def __init__(
        self, cache: TowerCache, passes: Passes, scheduler: ContextScheduler, prefixes: Prefixes, chunk: int
    ) -> None:
        """`chunk`: positions of a prompt that one forward reads."""
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
        """The number of tokens read."""
        slot = self._by_key[key].slot
        return 0 if slot == _UNOPENED else self._cache.length(slot)

    def open(
        self,
        key: Key,
        owner: Owner,
        prompt: Sequence[int],
        positions: int,
        salt: str | None = "",
        decided_from: int | None = None,
    ) -> None:
        """Read `prompt` in chunks, with room for `positions`. Raises Overloaded without room.

        `salt`: only prefixes with the same salt are shared; None: the prompt shares nothing, and none of it is kept.
        `decided_from`: the first position whose hidden state is needed, so that it must be read here; None: the
        prompt's last.
        """
        first = max(0, len(prompt) - 1) if decided_from is None else decided_from
        names = prefix_names(prompt, self._prefixes.stride, salt)
        usable = first // self._prefixes.stride if names else 0
        promised = self._room.take(positions, names[:usable])
        self._by_key[key] = ContextSequence(owner, _UNOPENED, list(prompt), names, promised)
        self._unopened[key] = _Needs(positions, usable, len(prompt))
        self._stirred = True

    def begin(self) -> None:
        """Give slots to waiting sequences that can have one."""
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
                break  # later ones would delay it
        self._scheduler.await_prompts(awaited)

    def _reader_of(self, names: Sequence[bytes], found: Found) -> Key | None:
        """The sequence that is reading the next stride of this one."""
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
        """Its numbers are not finite: none of its prompt's prefixes are kept."""
        self._prefixes.forget(self._by_key[key].names)

    def keep(self, chunk: PrefillChunk) -> None:
        """A chunk of this prompt has just been read. If a prefix ends with it, keep the prefix for others."""
        stride, sequence = self._prefixes.stride, self._by_key[chunk.key]
        if not sequence.names or chunk.end % stride:
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
        """The sequence stops decoding for now; its newest token is not read."""
        self._scheduler.drop(key)
        self._by_key[key].to_read = []

    def close(self, key: Key) -> None:
        """Close the sequence. Its slot may be reused at once, so no pass that writes there may be in progress
        (`Prompts.finish`).
        """
        self._scheduler.drop(key)
        self._unopened.pop(key, None)
        sequence = self._by_key.pop(key)
        if sequence.slot != _UNOPENED:
            self._cache.free(sequence.slot)
        self._room.give(sequence.promised)
        self._comes_no_more(sequence.names, key)

    def read(self, keys: Sequence[Key], want: Want) -> Tensor:
        """One forward over the unread tokens of these sequences. Returns the result of `Passes.run`."""
        tokens = [self._by_key[key].to_read for key in keys]
        out = self._passes.run([self._by_key[key].slot for key in keys], tokens, want=want)
        self.have_read(zip(keys, map(len, tokens), strict=True))
        return out

    def verify(self, keys: Sequence[Key]) -> tuple[list[list[int]], Tensor, KeptScans | None]:
        """One forward over the blocks of these sequences that changes no state. Returns the blocks, and the result of
        `Passes.verify`.
        """
        blocks = [self._by_key[key].to_read for key in keys]
        return blocks, *self._passes.verify([self._by_key[key].slot for key in keys], blocks)

    def settle(self, keys: Sequence[Key], scans: KeptScans | None, cuts: Sequence[int]) -> None:
        """Advance each sequence by so many tokens of its block; the rest of the block is dropped."""
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
