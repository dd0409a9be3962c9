"""The context engine's end of a link to another process.

Owns the backlog of replies that wait for a staging buffer. Knows nothing of how the two ends found each other.
"""

import threading
from collections import deque
from collections.abc import Sequence
from functools import partial

from twotower.errors import LinkDown, TwoTowerError
from twotower.exchange.data_group import DataGroup
from twotower.exchange.endpoint import Endpoint, MessageStream, Outgoing
from twotower.exchange.messages import Message, Payload, Taken
from twotower.exchange.protocol import Command, Commit, Delta, Failed, Prefill, Release, Released, Reply
from twotower.exchange.staging import DeltaLayout, StagingBuffer, StagingPool
from twotower.model.cache import TowerCache


class DistributedPort:
    """Replies sent before the denoiser side has connected, or while all buffers are under way, wait in the backlog."""

    apart = True

    def __init__(self, cache: TowerCache, endpoint: Endpoint, layout: DeltaLayout) -> None:
        self._cache, self._endpoint, self._layout = cache, endpoint, layout
        self._inbox: deque[Command] = deque()
        self._backlog: deque[Reply] = deque()
        self._pool: StagingPool | None = None
        # One credit per buffer that the denoiser side has free.
        self._credits = threading.Semaphore(0)
        self._payloads = 0

    @property
    def lost(self) -> str | None:
        return self._endpoint.lost

    def receive(self) -> list[Command]:
        self._flush()
        return [self._inbox.popleft() for _ in range(len(self._inbox))]

    def send(self, replies: Sequence[Reply]) -> None:
        for reply in replies:
            if isinstance(reply, Released):
                self._drop_deltas(reply.sequence)
            self._backlog.append(reply)
        self._flush()

    def close(self) -> None:
        self._endpoint.close("closed by the context side")
        self._backlog.clear()

    def run(self, stream: MessageStream, group: DataGroup, pool: StagingPool) -> None:
        """The link is connected: carry messages until it is lost. Called on the link's first thread."""
        self._pool = pool
        self._credits.release(self._endpoint.settings.staging_buffers)
        self._wake_for_backlog()
        send = partial(self._endpoint.run_sender, stream, group, self._sent)
        self._endpoint.spawn("sender", send)
        self._endpoint.run_receiver(stream, self._handle)

    def _handle(self, message: Message) -> None:
        if isinstance(message, Taken):
            self._credits.release()
            self._wake_for_backlog()
        elif isinstance(message, Prefill | Commit | Release):
            self._inbox.append(message)
            self._endpoint.hooks.on_activity()
        else:
            raise LinkDown(f"the denoiser side sent a {type(message).__name__}, wanted a command")

    def _sent(self, buffer: StagingBuffer) -> None:
        assert self._pool is not None
        self._pool.give(buffer)
        self._wake_for_backlog()

    def _wake_for_backlog(self) -> None:
        if self._backlog:
            self._endpoint.hooks.on_activity()

    def _drop_deltas(self, sequence: int) -> None:
        """The slot is about to be reused: waiting deltas must not be read from the cache."""
        kept = [r for r in self._backlog if not (isinstance(r, Delta) and r.sequence == sequence)]
        self._backlog = deque(kept)

    def _flush(self) -> None:
        """Post all replies that can be posted now, in order."""
        if self._endpoint.lost is not None:
            self._backlog.clear()
        while self._backlog:
            head = self._backlog[0]
            if not isinstance(head, Delta):
                self._endpoint.post(self._next_verdicts())
            elif self._overtaken(head):
                self._backlog[0] = _overtaken_failure(head)
            elif not self._post_deltas():
                return

    def _next_verdicts(self) -> list[Message]:
        """The replies before the next delta, to be sent as one message."""
        taken: list[Message] = []
        while self._backlog and not isinstance(head := self._backlog[0], Delta):
            taken.append(head)
            self._backlog.popleft()
        return taken

    def _post_deltas(self) -> bool:
        """Pack the deltas at the backlog's head as one payload; False if no buffer is free at both ends."""
        if not self._credits.acquire(blocking=False):
            return False
        assert self._pool is not None
        buffer = self._pool.take()
        if buffer is None:
            self._credits.release()
            return False
        deltas = self._next_deltas()
        nbytes = self._layout.nbytes(deltas)
        self._payloads += 1
        announcement = [Payload(self._payloads, nbytes, deltas)]
        # Announced before it is packed where possible: the other side wakes meanwhile.
        announced = self._endpoint.post_at_once(announcement)
        buffer.grow(nbytes)
        self._layout.pack(deltas, buffer)
        buffer.mark()
        self._endpoint.post_payload(Outgoing([] if announced else announcement, buffer, nbytes, self._payloads))
        return True

    def _next_deltas(self) -> tuple[Delta, ...]:
        """As many as fit into a buffer, at least one."""
        room = self._endpoint.settings.staging_bytes
        taken: list[Delta] = []
        while self._backlog:
            head = self._backlog[0]
            if not isinstance(head, Delta) or self._overtaken(head):
                break
            room -= self._layout.nbytes([head])
            if taken and room < 0:
                break
            taken.append(head)
            self._backlog.popleft()
        return tuple(taken)

    def _overtaken(self, delta: Delta) -> bool:
        """The cache's Mamba states are no longer those after this delta."""
        return delta.complete and self._cache.length(delta.slot) != delta.end


def _overtaken_failure(delta: Delta) -> Failed:
    return Failed(
        delta.sequence,
        TwoTowerError(f"sequence {delta.sequence} moved on before its delta [{delta.start}, {delta.end}) was sent"),
    )
