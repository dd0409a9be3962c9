"""One end of a connected link: a sender thread, a receiver thread, heartbeats, and one verdict when it is lost.

Owns the control channel and the data group once both are connected. Knows nothing of caches, sequences or which side it
is.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch

from twotower.errors import LinkDown, TwoTowerError
from twotower.exchange.control import Channel
from twotower.exchange.data_group import DataGroup
from twotower.exchange.messages import CODEC, Heartbeat, Message
from twotower.exchange.settings import EngineHooks, LinkSettings
from twotower.exchange.staging import StagingBuffer
from twotower.model.transfer import current
from twotower.transport.codec import CodecError, listed

_CPU = torch.device("cpu")
_JOIN_S = 2.0


class MessageStream:
    """Messages over a channel, as many as are sent at once in a frame."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def send(self, messages: Sequence[Message]) -> None:
        self.channel.send(_body(messages))

    def send_at_once(self, messages: Sequence[Message]) -> bool:
        """`send` if that needs no waiting; False if it might."""
        return self.channel.send_at_once(_body(messages))

    def receive(self) -> list[Message]:
        """One frame's messages. Raises CodecError and what the channel raises."""
        return CODEC.decode(self.channel.receive())


def _body(messages: Sequence[Message]) -> bytes:
    return listed([CODEC.encode(message) for message in messages])


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Messages to send, and the buffer whose bytes are announced by the last of them or by an earlier message."""

    messages: Sequence[Message]
    buffer: StagingBuffer | None = None
    nbytes: int = 0
    number: int = 0


class Endpoint:
    """`name` is the link's, for messages; `peer` the other side's in them; `device` is that of the buffers."""

    def __init__(
        self,
        name: str,
        peer: str,
        settings: LinkSettings,
        hooks: EngineHooks,
        device: torch.device = _CPU,
    ) -> None:
        self.lost: str | None = None
        self.settings, self.hooks = settings, hooks
        self._name, self._peer, self._device = name, peer, device
        self._outbox: SimpleQueue[Outgoing | None] = SimpleQueue()
        self._sending = threading.Lock()  # its holder sends frames; `_unsent` posts wait for the sender
        self._counting = threading.Lock()
        self._unsent = 0
        self._stream: MessageStream | None = None
        self._lock = threading.Lock()
        self._aborts: list[Callable[[], None]] = []
        self._threads: list[threading.Thread] = []
        self._pulse = _Pulse()
        self._channel: Channel | None = None

    def adopt(self, channel: Channel) -> None:
        """Own the channel: aborted when the link is lost, closed by `close`."""
        self._channel = channel
        self.when_lost(channel.abort)

    def post(self, messages: Sequence[Message]) -> None:
        """Send in order, without ever waiting: now if nothing is before it, else by the sender thread. From one thread.

        Waking that thread costs the engine more interpreter time than sending a few hundred bytes.
        """
        if not self.post_at_once(messages):
            self.post_payload(Outgoing(messages))

    def post_at_once(self, messages: Sequence[Message]) -> bool:
        """`post` without another thread; False if something is before it, or if it might have to wait."""
        try:
            if self._unsent == 0 and self._stream is not None and self._sending.acquire(blocking=False):
                try:
                    return self.lost is None and self._stream.send_at_once(messages)
                finally:
                    self._sending.release()
        except Exception as error:
            self.lose(self.explain(error, self.settings.link_timeout_s))
        return False

    def post_payload(self, outgoing: Outgoing) -> None:
        """Let the sender thread send it: it may have to wait until the other side takes the bytes."""
        with self._counting:
            self._unsent += 1
        self._outbox.put(outgoing)

    def lose(self, reason: str) -> None:
        """The link is lost. The first reason stays; from any thread."""
        with self._lock:
            if self.lost is not None:
                return
            self.lost = f"{self._name}: {reason}"
            aborts, self._aborts = self._aborts, []
        for abort in aborts:
            abort()
        self._outbox.put(None)
        self.hooks.on_activity()

    def when_lost(self, abort: Callable[[], None]) -> None:
        """Call this once the link is lost; at once if it is already."""
        with self._lock:
            if self.lost is None:
                self._aborts.append(abort)
                return
        abort()

    def spawn(self, task: str, body: Callable[[], None]) -> None:
        """Run `body` on a thread of the link; an error in it ends the link."""

        def guarded() -> None:
            try:
                with current(self._device):
                    body()
            except Exception as error:
                self.lose(self.explain(error, self.settings.link_timeout_s))

        thread = threading.Thread(target=guarded, name=f"{self._name} {task}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self, reason: str) -> None:
        """End the link and its threads. One that waits in a data transfer to a hung peer ends at its own deadline."""
        self.lose(reason)
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        if self._channel is not None:
            self._channel.close()

    def run_sender(self, stream: MessageStream, group: DataGroup, sent: Callable[[StagingBuffer], None]) -> None:
        """Send what was posted and a heartbeat in time, until the link is lost. `sent` gets each buffer back."""
        self._stream = stream
        beat_at = time.monotonic()
        while self.lost is None:
            if time.monotonic() >= beat_at:
                with self._sending:
                    stream.send([Heartbeat(self.hooks.progress())])
                beat_at = time.monotonic() + self.settings.beat_s
            posts = self._posted(max(beat_at - time.monotonic(), 0))
            if not posts:
                continue
            with self._sending:
                # As one frame: a burst costs the other side one waking.
                if messages := [message for post in posts for message in post.messages]:
                    stream.send(messages)
                with self._counting:
                    self._unsent -= len(posts)
            last = posts[-1]
            if last.buffer is not None:
                group.send(last.buffer, last.nbytes, last.number, self.settings.link_timeout_s)
                sent(last.buffer)

    def _posted(self, timeout_s: float) -> list[Outgoing]:
        """What was posted since, up to the first payload."""
        posts: list[Outgoing] = []
        try:
            item = self._outbox.get(timeout=timeout_s)
            while item is not None:
                posts.append(item)
                if item.buffer is not None:
                    break
                item = self._outbox.get_nowait()
        except Empty:
            pass
        return posts

    def run_receiver(self, stream: MessageStream, handle: Callable[[Message], None]) -> None:
        """Hand messages to `handle` until the link is lost."""
        while self.lost is None:
            for message in stream.receive():
                if isinstance(message, Heartbeat):
                    self._watch(message)
                else:
                    handle(message)

    def _watch(self, heartbeat: Heartbeat) -> None:
        stuck_s = self._pulse.stuck_s(heartbeat)
        if stuck_s > self.settings.stall_timeout_s:
            raise LinkDown(f"{self._peer} is alive but its engine has made no progress for {stuck_s:.1f} s")

    def explain(self, error: Exception, waited_s: float) -> str:
        """One sentence for the error that ended the link; `waited_s`: the timeout of the failed wait."""
        match error:
            case EOFError() | ConnectionError():
                return f"{self._peer} is gone (connection closed)"
            case TimeoutError():
                return f"nothing heard from {self._peer} for {waited_s:g} s"
            case CodecError():
                return f"{self._peer} sent an unknown message: {error}"
            case TwoTowerError():
                return str(error)
        return f"{type(error).__name__}: {error}"


class _Pulse:
    """How long the other side's engine has stood still."""

    def __init__(self) -> None:
        self._progress = -1
        self._since = time.monotonic()

    def stuck_s(self, heartbeat: Heartbeat) -> float:
        now = time.monotonic()
        if heartbeat.progress != self._progress:
            self._progress, self._since = heartbeat.progress, now
        return now - self._since
