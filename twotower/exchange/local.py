"""The exchange within one process: both towers on one device, ticked by one thread.

The denoiser reads the context tower's cache itself, so a delta only says that the cache has grown.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from twotower.exchange.protocol import Command, LinkEvent, LinkLost, Reply, Traffic
from twotower.model.cache import TowerCache

_Item = TypeVar("_Item")


class LocalExchange:
    """Both ends in one object: `link` for the denoiser engine, `port` for the context engine.

    `wake` is called when either end has something to take.
    """

    def __init__(self, cache: TowerCache, wake: Callable[[], None]) -> None:
        commands: deque[Command] = deque()
        replies: deque[LinkEvent] = deque()
        self.port = LocalPort(commands, replies, wake)
        self.link = LocalLink(cache, commands, replies, self.port, wake)


class LocalPort:
    """The context engine's end."""

    apart = False

    def __init__(self, commands: deque[Command], replies: deque[LinkEvent], wake: Callable[[], None]) -> None:
        self.lost: str | None = None
        self._commands, self._replies, self._wake = commands, replies, wake

    def receive(self) -> list[Command]:
        return _drain(self._commands)

    def send(self, replies: Sequence[Reply]) -> None:
        self._replies.extend(replies)
        self._wake()

    def close(self) -> None:
        if self.lost is None:
            self.lost = "closed by the context side"
            self._replies.append(LinkLost(self.lost))
            self._wake()


class LocalLink:
    """The denoiser engine's end."""

    apart = False

    def __init__(
        self,
        cache: TowerCache,
        commands: deque[Command],
        replies: deque[LinkEvent],
        port: LocalPort,
        wake: Callable[[], None],
    ) -> None:
        self.cache, self.traffic = cache, Traffic()  # nothing crosses
        self._commands, self._replies, self._port, self._wake = commands, replies, port, wake

    def submit(self, commands: Sequence[Command], reading: bool = False) -> None:
        if commands and self._port.lost is None:
            self._commands.extend(commands)
            self._wake()

    def poll(self) -> list[LinkEvent]:
        return _drain(self._replies)

    def close(self) -> None:
        if self._port.lost is None:
            self._port.lost = "closed by the denoiser side"
            self._wake()


def _drain(queue: deque[_Item]) -> list[_Item]:
    taken = list(queue)
    queue.clear()
    return taken
