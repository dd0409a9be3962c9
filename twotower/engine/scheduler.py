"""Which work the context engine does next. Pure Python: knows sequences by their keys, not by their tensors.

A cycle runs at most one commit batch (perhaps in two halves), one decode batch and one prefill batch. Waiting commits
come first, because a denoiser waits for them. But each kind runs once a cycle, so none starves.

Prompts are read a chunk at a time. Two prompts lead prefill batches in turn: the one that came first, and the one with
the least left to read. If another prompt waits for a prompt, the latter counts as having no more left than the former.
So the shortest prompt waits for at most one batch of another. Every prompt is read after at most twice as many batches
as there were chunks at its arrival, its own included.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

Key = Hashable
_NARROW = 16  # positions: blocks of up to so many are always read together, to batch them


@dataclass(frozen=True, slots=True)
class CommitBatch:
    """Read these sequences' waiting blocks."""

    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Give each of these AR sequences its next token."""

    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Positions [start, end) of one sequence's prompt."""

    key: Key
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """Chunks of different prompts, read in one forward."""

    chunks: tuple[PrefillChunk, ...]


Work = CommitBatch | DecodeBatch | PrefillBatch


@dataclass(slots=True)
class _Prompt:
    done: int
    length: int

    @property
    def left(self) -> int:
        return self.length - self.done

    def chunk_end(self, chunk: int) -> int:
        """A chunk ends at a multiple of the chunk size, never at leftover budget: a prompt's numbers must not depend on
        the load."""
        return min(self.length, (self.done // chunk + 1) * chunk)


class ContextScheduler:
    """Queues of a context engine: blocks to commit, prompts to read, AR sequences to decode.

    `waited_for`: whether the denoisers of these blocks have nothing to do until the blocks are read.
    """

    def __init__(
        self, prefill_chunk_tokens: int, waited_for: Callable[[Sequence[Key]], bool] = lambda keys: False
    ) -> None:
        self._chunk, self._waited_for = prefill_chunk_tokens, waited_for
        self._halved = False  # the last commit batch was the first half of one
        self._commits: OrderedDict[Key, int] = OrderedDict()
        self._decoding: dict[Key, None] = {}
        self._prompts: OrderedDict[Key, _Prompt] = OrderedDict()
        self._done_this_cycle: set[type] = set()
        self._reading: PrefillBatch | None = None
        self._shortest_leads = False  # the next prefill batch
        self._awaited: Mapping[Key, int] = {}

    def add_prompt(self, key: Key, done: int, length: int) -> None:
        """Read positions [done, length) of a prompt when its turn comes."""
        self._prompts[key] = _Prompt(done, length)

    def await_prompts(self, awaited: Mapping[Key, int]) -> None:
        """Other sequences wait until these prompts have read the common prefix. For each prompt: the fewest unread
        tokens among the waiting ones.
        """
        self._awaited = awaited

    def add_commit(self, key: Key, length: int) -> None:
        """Read a block of `length` tokens when its turn comes. A sequence has one at a time."""
        assert key not in self._commits, "a second block before the first was read"
        self._commits[key] = length

    def add_decoding(self, key: Key) -> None:
        self._decoding[key] = None

    def drop(self, key: Key) -> None:
        """Drop all waiting work of this sequence."""
        self._decoding.pop(key, None)
        self._prompts.pop(key, None)
        self._commits.pop(key, None)

    def has_read(self) -> None:
        """The current prefill batch is done; until then `next` returns it again in every cycle."""
        self._reading = None

    def next(self) -> Work | None:
        """The next forward's work, or None if nothing waits."""
        work = self._pick()
        if work is None and self._done_this_cycle:
            self._done_this_cycle.clear()
            work = self._pick()
        if work is not None and not (isinstance(work, CommitBatch) and self._halved):
            self._done_this_cycle.add(type(work))
        return work

    def _pick(self) -> Work | None:
        if self._commits and CommitBatch not in self._done_this_cycle:
            return self._commit_batch()
        if self._decoding and DecodeBatch not in self._done_this_cycle:
            return DecodeBatch(tuple(self._decoding))
        if (self._reading or self._prompts) and PrefillBatch not in self._done_this_cycle:
            self._reading = self._reading or self._prefill_batch()
            return self._reading
        return None

    def _commit_batch(self) -> CommitBatch:
        """All waiting blocks, in order. A wide block shares a forward only as far as the padded tokens fit one chunk,
        because all rows are padded to its width. Blocks that do not fit come first next time.

        If the denoisers wait for all of these blocks, the blocks are read in two halves. Rows that return together also
        fill their next blocks together, so their denoiser would wait for all of them every time. With halves it steps
        the first half while the other is read, and from then on the halves alternate.
        """
        keys: list[Key] = []
        widest = 0
        for key, length in self._commits.items():
            wider = max(widest, length)
            if keys and wider > _NARROW and wider * (len(keys) + 1) > self._chunk:
                continue
            keys.append(key)
            widest = wider
        self._halved = not self._halved and self._is_all_there_is(keys) and self._waited_for(keys)
        if self._halved:
            keys = keys[: -(-len(keys) // 2)]
        for key in keys:
            del self._commits[key]
        return CommitBatch(tuple(keys))

    def _is_all_there_is(self, keys: Sequence[Key]) -> bool:
        """If other work comes between, or a block was left out already, the other half would lose more time than the
        first half gains.
        """
        return len(keys) == len(self._commits) > 1 and not (self._decoding or self._prompts or self._reading)

    def _prefill_batch(self) -> PrefillBatch:
        """The leading prompt's next chunk, and the others' next chunks, oldest first, as far as they fit one chunk's
        worth of padded tokens with it."""
        chunks: list[PrefillChunk] = []
        widest = 0
        for key in self._leader_first():
            prompt = self._prompts[key]
            end = prompt.chunk_end(self._chunk)
            wider = max(widest, end - prompt.done)
            if chunks and wider * (len(chunks) + 1) > self._chunk:
                continue
            chunks.append(PrefillChunk(key, prompt.done, end))
            widest = wider
        for chunk in chunks:
            self._prompts[chunk.key].done = chunk.end
            if not self._prompts[chunk.key].left:
                del self._prompts[chunk.key]
        return PrefillBatch(tuple(chunks))

    def _leader_first(self) -> list[Key]:
        keys = list(self._prompts)
        if self._shortest_leads:
            shortest = min(keys, key=self._left)
            keys.remove(shortest)
            keys.insert(0, shortest)
        self._shortest_leads = not self._shortest_leads
        return keys

    def _left(self, key: Key) -> int:
        left = self._prompts[key].left
        return min(left, self._awaited.get(key, left))
