"""Which work the context engine does next. Pure Python: knows sequences by their keys, not by their tensors.

A cycle runs at most one commit batch, one decode batch and one prefill batch. Commits come first whenever some wait,
because a denoiser waits for them; but each kind runs once a cycle, so nobody starves.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

Key = Hashable
_NARROW = 16  # positions: blocks of up to so many are always read together, which is what batching is for


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


class ContextScheduler:
    """Queues of a context engine: blocks to commit, prompts to read, AR sequences to decode."""

    def __init__(self, prefill_chunk_tokens: int) -> None:
        self._chunk = prefill_chunk_tokens
        self._commits: OrderedDict[Key, int] = OrderedDict()
        self._decoding: dict[Key, None] = {}
        self._prompts: OrderedDict[Key, _Prompt] = OrderedDict()
        self._done_this_cycle: set[type] = set()
        self._reading: PrefillBatch | None = None

    def add_prompt(self, key: Key, done: int, length: int) -> None:
        """Read positions [done, length) of a prompt when its turn comes."""
        self._prompts[key] = _Prompt(done, length)

    def add_commit(self, key: Key, length: int) -> None:
        """Read a block of `length` tokens when its turn comes. A sequence has one at a time."""
        assert key not in self._commits, "a second block before the first was read"
        self._commits[key] = length

    def put_back(self, lengths: Mapping[Key, int]) -> None:
        """These blocks of the commit batch are not read yet: they are the first of the next one."""
        for key, length in reversed(list(lengths.items())):
            self._commits[key] = length
            self._commits.move_to_end(key, last=False)

    def add_decoding(self, key: Key) -> None:
        self._decoding[key] = None

    def drop(self, key: Key) -> None:
        """Forget everything that waits for this sequence."""
        self._decoding.pop(key, None)
        self._prompts.pop(key, None)
        self._commits.pop(key, None)

    def has_read(self) -> None:
        """The prefill batch under way is done; until then `next` gives it again in every cycle."""
        self._reading = None

    def next(self) -> Work | None:
        """The next forward's work, or None where nothing waits."""
        work = self._pick()
        if work is None and self._done_this_cycle:
            self._done_this_cycle.clear()
            work = self._pick()
        if work is not None:
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
        """All blocks that wait, in order. A wide one shares a forward only as far as the padded tokens fit one chunk:
        its width would be everybody's. What does not fit goes first next time.
        """
        keys: list[Key] = []
        widest = 0
        for key, length in self._commits.items():
            wider = max(widest, length)
            if keys and wider > _NARROW and wider * (len(keys) + 1) > self._chunk:
                continue
            keys.append(key)
            widest = wider
        for key in keys:
            del self._commits[key]
        return CommitBatch(tuple(keys))

    def _prefill_batch(self) -> PrefillBatch:
        """The oldest prompts' next chunks, as many as fit one chunk's worth of padded tokens.

        A chunk ends at a multiple of the chunk size, never at leftover budget: a prompt's numbers must not depend on
        the load.
        """
        chunks: list[PrefillChunk] = []
        widest = 0
        for key, prompt in self._prompts.items():
            end = min(prompt.length, (prompt.done // self._chunk + 1) * self._chunk)
            widest = max(widest, end - prompt.done)
            if chunks and widest * (len(chunks) + 1) > self._chunk:
                break
            chunks.append(PrefillChunk(key, prompt.done, end))
        for chunk in chunks:
            self._prompts[chunk.key].done = chunk.end
            if chunk.end == self._prompts[chunk.key].length:
                del self._prompts[chunk.key]
        return PrefillBatch(tuple(chunks))
