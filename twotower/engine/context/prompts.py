"""Reads prompts of every owner: chunk by chunk, and long chunks in parts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from twotower.engine.context.sequences import Owner, ReadChunk, Sequences
from twotower.engine.passes import PROMPT_PARTS, SHORT_PROMPT, EagerPasses, Passes, Want
from twotower.engine.scheduler import ContextScheduler, Key, PrefillChunk
from twotower.engine.short_memory import ShortMemory
from twotower.engine.steps import take_all
from twotower.errors import Overloaded
from twotower.model.transfer import fence_on


@dataclass(slots=True)
class _UnderWay:
    """Chunks being read, and their pass, with `left` parts to come."""

    chunks: Sequence[PrefillChunk]
    parts: Iterator[Tensor]
    left: int = PROMPT_PARTS


class Prompts:
    """At most one pass is in progress. Between its parts other slots are read."""

    def __init__(
        self,
        sequences: Sequences,
        scheduler: ContextScheduler,
        passes: Passes,
        eager: EagerPasses,
        device: torch.device,
        short: ShortMemory,
        fail: Callable[[Key, Overloaded], None],
    ) -> None:
        """`fail`: called if there was no memory to read this sequence's prompt."""
        self._sequences, self._scheduler, self._device = sequences, scheduler, device
        self._short, self._fail = short, fail
        self._passes, self._eager = passes, eager
        self._under_way: _UnderWay | None = None
        self._last_part: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Wait until the last part is read. Otherwise a GPU's host would queue chunk after chunk, and a new commit
        would come after all of them.
        """
        if self._last_part is not None:
            self._last_part.synchronize()
            self._last_part = None

    def read(self, chunks: Sequence[PrefillChunk]) -> None:
        """Read these chunks. A long chunk is read in parts, one part a call, so that stepping rows wait for one part
        only.
        """
        short = self._short.tried(len(chunks), partial(self._read, chunks))
        if short is not None:
            self._under_way = None
            self._scheduler.has_read()
            for chunk in chunks:
                self._fail(chunk.key, short)

    def _read(self, chunks: Sequence[PrefillChunk]) -> None:
        if self._under_way is None:
            sequences = [self._sequences[chunk.key] for chunk in chunks]
            slots = [sequence.slot for sequence in sequences]
            tokens = [s.to_read[: c.end - c.start] for s, c in zip(sequences, chunks, strict=True)]
            want = Want.HIDDEN if any(map(self._wants_hidden, chunks)) else Want.STATES
            if max(map(len, tokens)) <= SHORT_PROMPT:
                self._have_read(chunks, self._passes.run(slots, tokens, want=want))
                self._last_part = fence_on(self._device)
                return
            self._under_way = _UnderWay(chunks, self._eager.parts(slots, tokens, PROMPT_PARTS, want))
        hidden_RLD = next(self._under_way.parts)
        self._under_way.left -= 1
        self._last_part = fence_on(self._device)
        if not self._under_way.left:
            self._under_way = None
            self._have_read(chunks, hidden_RLD)

    def finish(self, key: Key) -> None:
        """End a pass that writes to this sequence's slot before the slot is reused."""
        while self._under_way is not None and any(chunk.key == key for chunk in self._under_way.chunks):
            self.read(self._under_way.chunks)

    def _wants_hidden(self, chunk: PrefillChunk) -> bool:
        sequence = self._sequences[chunk.key]
        return sequence.owner.wants_hidden(last=chunk.end - chunk.start == len(sequence.to_read))

    def _have_read(self, chunks: Sequence[PrefillChunk], hidden_RLD: Tensor) -> None:
        self._scheduler.has_read()
        self._sequences.have_read((chunk.key, chunk.end - chunk.start) for chunk in chunks)
        for chunk in chunks:
            self._sequences.keep(chunk)  # before an owner ends the sequence
        by_owner: dict[Owner, list[ReadChunk]] = {}
        for row, chunk in enumerate(chunks):
            sequence = self._sequences[chunk.key]
            by_owner.setdefault(sequence.owner, []).append(ReadChunk(row, chunk, last=not sequence.to_read))
        # All is queued on the device before anything is read from it.
        steps = [owner.has_read(read, hidden_RLD) for owner, read in by_owner.items()]
        take_all([step for step in steps if step is not None])
