"""The prefix cache: prefixes of prompts that the context tower has read, kept for prompts that begin alike.

A prefix ends at a multiple of the stride, where a chunk of every prompt ends. So a prompt after a kept prefix is read
in the same chunks as a prompt that is read whole. Its numbers have the same bits, except for rounding that depends on
the other rows of the forwards. Keys and values are kept by reference: the pages stay in place, and a page is kept only
once it is full. Mamba states are copied to snapshots, of which there are few. Knows neither requests nor why a prompt
is read.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from twotower.model.cache import TowerCache


@dataclass(frozen=True, slots=True)
class Found:
    """The longest kept prefix of a prompt: its positions (0: none), their pages, and the states after them."""

    positions: int = 0
    pages: tuple[int, ...] = ()
    snapshot: int | None = None


NOTHING_FOUND = Found()


@dataclass(slots=True)
class _Node:
    """The last stride of one prefix. `children`: the number of kept prefixes that are one stride longer.

    It has a snapshot or children or both. Without a snapshot no prompt can continue after it, but longer prefixes need
    its pages.
    """

    parent: bytes | None
    pages: tuple[int, ...]
    snapshot: int | None = None
    children: int = 0


class Prefixes:
    """Kept prefixes by name (`twotower.engine.sharing`), in `cache`: as many as it has snapshots.

    If pages or a snapshot are needed, the least recently used prefixes are evicted.
    """

    def __init__(self, cache: TowerCache, stride: int) -> None:
        """`stride`: a whole number of pages; 0: nothing is kept."""
        assert stride % cache.page_tokens == 0, "a prefix ends with a page"
        self.stride = stride if len(cache.snapshots) else 0
        self._cache, self._pages_each = cache, stride // cache.page_tokens
        self._nodes: dict[bytes, _Node] = {}
        self._recent: OrderedDict[bytes, None] = OrderedDict()  # those with a snapshot, the most recently used last
        self._free = list(range(len(cache.snapshots) - 1, -1, -1))
        self.lookups = self.hits = self.positions_saved = self.evictions = 0
        cache.room.reclaim = self._reclaim

    def __len__(self) -> int:
        return len(self._recent)

    def __contains__(self, name: bytes) -> bool:
        return name in self._recent

    @property
    def nbytes(self) -> int:
        """Bytes of the kept snapshots and pages."""
        cache = self._cache
        each = cache.snapshots.nbytes // max(len(cache.snapshots), 1)
        page = (cache.keys.nbytes + cache.values.nbytes) // cache.keys.shape[1]
        return len(self._recent) * each + cache.room.kept_pages * page

    def find(self, names: Sequence[bytes]) -> Found:
        """The longest of these prefixes that is kept with its states."""
        for count in range(len(names), 0, -1):
            node = self._nodes.get(names[count - 1])
            if node is not None and node.snapshot is not None:
                pages = [page for name in names[:count] for page in self._nodes[name].pages]
                return Found(count * self.stride, tuple(pages), node.snapshot)
        return NOTHING_FOUND

    def used(self, names: Sequence[bytes], found: Found) -> None:
        """A prompt with these prefixes continues after the found prefix, if any."""
        self.lookups += 1
        if found.positions:
            self.hits += 1
            self.positions_saved += found.positions
            name = names[found.positions // self.stride - 1]
            if name in self._recent:  # the prompt's other needs may have evicted it
                self._recent.move_to_end(name)

    def keep(self, names: Sequence[bytes], slot: int) -> None:
        """Keep the last of these prefixes, which the sequence at `slot` has read, and nothing after it."""
        if not len(self._cache.snapshots):
            return
        last = self._nodes.get(names[-1])
        if last is not None and last.snapshot is not None:
            self._recent.move_to_end(names[-1])
            return
        if not self._free:
            self._evict(next(iter(self._recent)))
        snapshot = self._free.pop()
        self._cache.snapshots.save(slot, snapshot)
        self._add(names, slot)
        self._nodes[names[-1]].snapshot = snapshot
        self._recent[names[-1]] = None

    def forget(self, names: Sequence[bytes]) -> None:
        """Drop these prefixes until they have been read again."""
        for name in reversed(names):
            if name in self._recent:
                self._evict(name)

    def _add(self, names: Sequence[bytes], slot: int) -> None:
        """Add nodes for prefixes without one, with the sequence's own pages."""
        pages = self._cache.pages_of(slot)
        for number, name in enumerate(names):
            if name in self._nodes:
                continue
            start = number * self._pages_each
            node = _Node(names[number - 1] if number else None, tuple(pages[start : start + self._pages_each]))
            self._cache.room.keep(node.pages)
            self._nodes[name] = node
            if node.parent is not None:
                self._nodes[node.parent].children += 1

    def _reclaim(self, pages: int) -> None:
        """Drop so many pages, or all that no sequence holds. Prefixes that no sequence holds go first: the others free
        no page now.
        """
        room = self._cache.room
        wanted = room.unused_pages + pages
        while room.unused_pages < wanted and self._recent:
            ends = [name for name in self._recent if not self._nodes[name].children]
            idle = (name for name in ends if all(map(room.is_idle, self._nodes[name].pages)))
            self._evict(next(idle, ends[0]))

    def _evict(self, name: bytes) -> None:
        """Drop its snapshot, and its pages unless a longer prefix needs them."""
        self.evictions += 1
        del self._recent[name]
        node = self._nodes[name]
        assert node.snapshot is not None
        self._free.append(node.snapshot)
        node.snapshot = None
        self._prune(name)

    def _prune(self, name: bytes) -> None:
        """Drop the pages of a prefix that nothing needs any more, and then of its shorter prefixes likewise."""
        node = self._nodes[name]
        while node.snapshot is None and not node.children:
            self._cache.room.drop(node.pages)
            del self._nodes[name]
            if node.parent is None:
                return
            name, node = node.parent, self._nodes[node.parent]
            node.children -= 1
