"""The denoiser engine's end of a link to another process.

Owns the mirror's slots of the link's sequences and the order in which deltas enter them. Knows nothing of how the
two ends found each other.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from twotower.errors import LinkDown, TwoTowerError
from twotower.exchange.data_group import DataGroup
from twotower.exchange.endpoint import Endpoint, MessageStream
from twotower.exchange.messages import Message, Payload, Taken
from twotower.exchange.protocol import Command, Delta, Failed, LinkEvent, LinkLost, Prefill, Release, Released, Traffic
from twotower.exchange.staging import DeltaLayout, StagingBuffer, StagingPool
from twotower.model.cache import Span, TowerCache
from twotower.model.scaled import Scaled
from twotower.model.transfer import fence_on


@dataclass(slots=True)
class _Mirror:
    """A sequence's place in the mirror. `arrived`: positions that have arrived; they are written unless the engine
    reads them.

    `deaf`: it has failed or is being released, and no delta changes it any more. `read`: a pass of the engine may still
    read it. `fence`: after it, the sequence's memory belongs to the sequence (CUDA).
    """

    slot: int
    reserve: int
    fence: torch.cuda.Event | None
    arrived: int = 0
    deaf: bool = False
    read: bool = False


@dataclass(slots=True)
class _Arrived:
    """A payload: its deltas, which of them are taken, the replies to the engine, and the parts of the mirror that grow.

    `written`: into the mirror, and the buffer is given back.
    """

    deltas: Sequence[Delta]
    buffer: StagingBuffer
    kept: list[int] = field(default_factory=list)
    events: list[Delta | Failed] = field(default_factory=list)
    mirrors: list[_Mirror] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    written: bool = False


class DistributedLink:
    """A mirror slot is taken with `Prefill` and freed when the context side's `Released` arrives."""

    apart = True

    def __init__(self, cache: TowerCache, endpoint: Endpoint, layout: DeltaLayout, pool: StagingPool) -> None:
        self.cache, self.traffic = cache, Traffic()
        self._endpoint, self._layout, self._pool = endpoint, layout, pool
        self._mirrors: dict[int, _Mirror] = {}
        self._inbox: deque[_Arrived | Failed | Released] = deque()
        self._taken: list[Message] = []  # sent with the next commands: one message a tick
        self._ended = False
        self._writing = threading.Lock()  # its holder may write into the mirror, or end the link

    def submit(self, commands: Sequence[Command], reading: bool = False) -> None:
        if self._endpoint.lost is not None:
            return
        self._allocate([c for c in commands if isinstance(c, Prefill)])
        for command in commands:
            mirror = self._mirrors.get(command.sequence)
            if mirror is not None:
                if isinstance(command, Release):
                    mirror.deaf = True  # never back to False: the receiver thread sets it too
                mirror.read = reading
        self._say(commands)

    def poll(self) -> list[LinkEvent]:
        if self._ended:
            return []
        lost = self._endpoint.lost  # before the inbox: messages from before the end are still delivered
        events = [event for _ in range(len(self._inbox)) for event in self._take(self._inbox.popleft())]
        if len(self._taken) >= max(1, self._endpoint.settings.staging_buffers - 1):
            self._say(())  # the other side is about to run out of buffers: it cannot wait for this tick's end
        if lost is not None:
            self._end()
            events.append(LinkLost(lost))
        return events

    def _say(self, commands: Sequence[Command]) -> None:
        if messages := (*self._taken, *commands):
            self._taken.clear()
            self._endpoint.post(messages)

    def give_up(self, reason: str) -> None:
        """End the link as if the other side were lost; `poll` reports it. From any thread."""
        self._endpoint.lose(reason)

    def close(self) -> None:
        self._endpoint.close("closed by the denoiser side")
        self._end()

    def run(self, stream: MessageStream, group: DataGroup) -> None:
        """The link is connected: start to carry messages."""
        send = partial(self._endpoint.run_sender, stream, group, self._pool.give)
        receive = partial(self._endpoint.run_receiver, stream, partial(self._handle, group))
        self._endpoint.spawn("sender", send)
        self._endpoint.spawn("receiver", receive)

    def _allocate(self, openings: Sequence[Prefill]) -> None:
        """A mirror slot for each or, raising Overloaded, for none."""
        taken: dict[int, _Mirror] = {}
        try:
            for command in openings:
                known = command.sequence in self._mirrors or command.sequence in taken
                assert not known, "a sequence number was used twice"
                slot = self.cache.allocate(command.reserve)
                taken[command.sequence] = _Mirror(slot, command.reserve, fence_on(self.cache.device))
        except BaseException:
            for mirror in taken.values():
                self.cache.free(mirror.slot)
            raise
        self._mirrors.update(taken)

    def _end(self) -> None:
        """Every sequence of the link has ended. A late payload is not written, because the slots may
        have new owners.
        """
        with self._writing:
            self._ended = True
        self._inbox.clear()
        for mirror in self._mirrors.values():
            self.cache.free(mirror.slot)
        self._mirrors.clear()

    def _handle(self, group: DataGroup, message: Message) -> None:
        """On the receiver thread."""
        if isinstance(message, Payload):
            self._inbox.append(self._fetch(group, message))
        elif isinstance(message, Failed | Released):
            self._hush(message.sequence)
            self._inbox.append(message)
        else:
            raise LinkDown(f"the context side sent a {type(message).__name__}, wanted a reply")
        self._endpoint.hooks.on_activity()

    def _hush(self, sequence: int) -> None:
        """Take no further delta of this sequence: its slot is about to be reused."""
        mirror = self._mirrors.get(sequence)
        if mirror is not None:
            mirror.deaf = True

    def _fetch(self, group: DataGroup, payload: Payload) -> _Arrived:
        """Receive a payload and write it into the mirror while the engine computes. On the receiver thread."""
        wanted = self._layout.nbytes(payload.deltas)
        if payload.nbytes != wanted:
            raise LinkDown(f"payload {payload.number} announced {payload.nbytes} bytes, its deltas need {wanted}")
        buffer = self._pool.take()
        if buffer is None:
            raise LinkDown(f"payload {payload.number} was announced without a free staging buffer")
        buffer.grow(payload.nbytes)
        arrived = self._sift(payload.deltas, buffer)
        timeout_s = self._endpoint.settings.link_timeout_s
        began = time.monotonic()
        group.receive(buffer, payload.nbytes, payload.number, timeout_s, self._unpacking(arrived))
        self._count(payload.nbytes, time.monotonic() - began)
        if arrived.written:
            self._pool.give(buffer)
        return arrived

    def _count(self, nbytes: int, seconds: float) -> None:
        self.traffic.payloads += 1
        self.traffic.nbytes += nbytes
        self.traffic.seconds += seconds

    @contextmanager
    def _unpacking(self, arrived: _Arrived) -> Iterator[None]:
        """Until the write has ended, the link does not end and its slots are not reused."""
        with self._writing:
            self._write_beside(arrived)
            yield

    def _write_beside(self, arrived: _Arrived) -> None:
        """On the receiver thread and the link's stream; not while the engine reads one of the sequences."""
        if self._ended or any(mirror.read for mirror in arrived.mirrors):
            return
        for mirror in arrived.mirrors:
            if mirror.fence is not None:
                torch.cuda.current_stream(self.cache.device).wait_event(mirror.fence)
        self._write(arrived)

    def _write(self, arrived: _Arrived) -> None:
        tensors = self._layout.views(arrived.deltas, arrived.buffer)
        if len(arrived.kept) < len(arrived.deltas):
            tensors = _only(arrived.kept, arrived.deltas, tensors)
        if arrived.spans:
            self.cache.write(arrived.spans, tensors)
        arrived.written = True

    def _take(self, item: _Arrived | Failed | Released) -> Sequence[LinkEvent]:
        if isinstance(item, _Arrived):
            return self._take_deltas(item)
        mirror = self._mirrors.get(item.sequence)
        if mirror is None:
            return []
        if isinstance(item, Released):
            self.cache.free(self._mirrors.pop(item.sequence).slot)
        return [item]

    def _take_deltas(self, arrived: _Arrived) -> Sequence[LinkEvent]:
        if not arrived.written:
            self._write(arrived)
            arrived.buffer.mark()
            self._pool.give(arrived.buffer)
        for span in arrived.spans:
            self.cache.advance(span.slot, span.end - span.start)
        self._taken.append(Taken())
        return [
            event for event in arrived.events if not (isinstance(event, Delta) and self._mirrors[event.sequence].deaf)
        ]

    def _sift(self, deltas: Sequence[Delta], buffer: StagingBuffer) -> _Arrived:
        """Decide which deltas of a payload are taken. On the receiver thread."""
        arrived = _Arrived(deltas, buffer)
        for place, delta in enumerate(deltas):
            mirror = self._mirrors.get(delta.sequence)
            if mirror is None or mirror.deaf:
                continue
            if delta.end <= mirror.arrived and delta.start < mirror.arrived:
                continue  # we have it already
            if delta.start != mirror.arrived or delta.end > mirror.reserve:
                mirror.deaf = True
                wanted = f"[{mirror.arrived}, …) within {mirror.reserve}"
                message = f"sequence {delta.sequence}: got a delta [{delta.start}, {delta.end}), wanted {wanted}"
                arrived.events.append(Failed(delta.sequence, TwoTowerError(message)))
                continue
            mirror.arrived = delta.end
            arrived.events.append(replace(delta, slot=mirror.slot))
            arrived.mirrors.append(mirror)
            arrived.spans.append(Span(mirror.slot, delta.start, delta.end, delta.complete))
            arrived.kept.append(place)
        return arrived


def _only(kept: Sequence[int], deltas: Sequence[Delta], tensors: Sequence[Tensor | Scaled]) -> list[Tensor | Scaled]:
    """The kept deltas' columns of a payload's tensors."""
    columns: list[int] = []
    states: list[int] = []
    column = state = 0
    for place, delta in enumerate(deltas):
        if place in kept:
            columns += range(column, column + delta.end - delta.start)
            states += [state] * delta.complete
        column += delta.end - delta.start
        state += delta.complete
    return [t[:, states if i in (2, 3) else columns] for i, t in enumerate(tensors)]
