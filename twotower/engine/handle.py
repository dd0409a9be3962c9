"""The pair's interface to an engine in any process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from twotower.core import AnyRequest, Event, RequestId


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters of one engine process since it started. Times in seconds.

    `near_ties`: decisions whose margin was so small that rounding might have changed them. `held_up_s`: time in which a
    denoiser had sequences and stepped none, because all waited for their commits' deltas. `prompt_wait_s`: the same,
    with some waiting for their prompts' deltas. `exchange_…`: counts of received deltas. `free_memory`: bytes that the
    device has left for the process, if the system says. `process`: its id. `prefix_…`: prompts of a context tower that
    were long enough for a kept prefix, how many had one, and positions that were not read. Further: evicted prefixes,
    and bytes of kept prefixes, whose pages count as free. `out_of_memory`: passes that found no memory.
    """

    tower: str
    ticks: int = 0
    rows: int = 0
    busy_s: float = 0.0
    sequences: int = 0
    free_slots: int = 0
    free_pages: int = 0
    total_slots: int = 0
    total_pages: int = 0
    near_ties: int = 0
    held_up_s: float = 0.0
    prompt_wait_s: float = 0.0
    exchange_bytes: int = 0
    exchange_payloads: int = 0
    exchange_s: float = 0.0
    free_memory: int | None = None
    process: int = 0
    prefix_lookups: int = 0
    prefix_hits: int = 0
    prefix_positions: int = 0
    prefix_evictions: int = 0
    prefix_bytes: int = 0
    out_of_memory: int = 0


class EngineHandle(Protocol):
    """A running engine process (or thread). Every method may raise Unavailable when it is gone.

    `add` and `cancel` never block; the engine hears them in the order they were called.
    """

    def add(self, requests: Sequence[AnyRequest]) -> None:
        """Start these requests. The caller's ledger has made sure that there is room."""
        ...

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """Free these sequences at the next tick; unknown ids are ignored. Each is answered by a ReleasedEvent."""
        ...

    async def events(self) -> list[Event]:
        """Wait for events. The list may be empty, after a second without events."""
        ...

    async def stats(self) -> list[EngineStats]:
        """One entry per tower the process hosts."""
        ...
