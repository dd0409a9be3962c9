"""The content of files, read again soon after one of them changes. Does not know its meaning."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from twotower.errors import ConfigError

logger = logging.getLogger(__name__)

Told = TypeVar("Told")

_LOOK_S = 1.0


class Rereading(Generic[Told]):
    """`now`: the content at the last successful reading. A later error is logged once, and the old content stays.
    `fault`: the present error; empty if there is none.
    """

    def __init__(self, what: str, paths: Sequence[Path], read: Callable[[], Told]) -> None:
        """`what`: the files' kind, for the log. Raises the error of `read`: ConfigError."""
        self._what, self._paths, self._read = what, paths, read
        self._state = self._seen()
        self.now = read()
        self.fault = ""

    async def watch(self) -> None:
        """Runs forever. The event loop does not wait for the disk."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await asyncio.to_thread(self.look)
            except Exception as error:
                self.fault = type(error).__name__
                logger.exception("the %s of before stay", self._what)

    def look(self) -> None:
        """Reads the files again if one has changed, or could not be read the last time."""
        state = self._seen()
        if state == self._state:
            self.fault = ""
            return
        try:
            now = self._read()
        except ConfigError as error:
            if str(error) != self.fault:
                logger.error("the %s of before stay: %s", self._what, error)
            self.fault = str(error)
            return
        self.now, self._state, self.fault = now, state, ""
        logger.info("%s read again from %s", self._what, ", ".join(map(str, self._paths)))

    def _seen(self) -> list[tuple[int, ...]]:
        return [_state(path) for path in self._paths]


def _state(path: Path) -> tuple[int, ...]:
    """A state that changes with every change of a file, of its rights, or of a Secret's link."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev, found.st_size)
