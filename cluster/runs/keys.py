"""The file of keys: who may ask, and how much. Keys themselves are in no file; it has their SHA-256.

A key is drawn here, from 256 random bits, so its plain hash gives nothing away.
"""

import hashlib
import hmac
import logging
import math
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from cluster.runs.callers import Caller, KeyRefused, Limits
from cluster.sections import Count, Section
from twotower.core import MAX_PRIORITY, MIN_PRIORITY
from twotower.errors import ConfigError
from twotower.showing import one_line

logger = logging.getLogger(__name__)

PREFIX = "tt-"
_MOST_BYTES, _MOST_KEYS = 2**20, 1000
_LOOK_S = 1.0


class KeyEntry(Section):
    """One key: its name, which logs and metrics show, its hash, and its limits, which all routers together keep."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    concurrent_requests: Count | None = None
    tokens_per_minute: Count | None = None
    priority_from: Annotated[int, Field(ge=MIN_PRIORITY, le=MAX_PRIORITY)] | None = None

    def limits(self, routers: int) -> Limits:
        """Of one of so many routers: an equal part, rounded up."""

        def part(whole: int | None) -> int | None:
            return None if whole is None else math.ceil(whole / routers)

        return Limits(part(self.concurrent_requests), part(self.tokens_per_minute), self.priority_from)


class KeysFile(Section):
    """The whole file."""

    keys: Annotated[list[KeyEntry], Field(min_length=1, max_length=_MOST_KEYS)]


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """A Door for those who have a key of the file. It is read again soon after it changes; what cannot be read then is
    told in the log, and the keys of before stay."""

    def __init__(self, path: Path, routers: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError."""
        self._path, self._routers, self._clock = path, routers, clock
        self._seen, self._looked_at = _state(path), clock()
        self._keys = read_keys(path)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self._keys)

    def caller(self, key: str | None, address: str) -> Caller:
        self._look()
        if key is None:
            raise KeyRefused("this service wants a key: send the header `Authorization: Bearer KEY`")
        given, found = hash_of(key), None
        for entry in self._keys:  # all of them, each in the same time: how long it takes tells nothing
            if hmac.compare_digest(entry.sha256, given):
                found = entry
        if found is None:
            raise KeyRefused("the key of this call is not known to this service")
        return Caller(found.name, found.limits(self._routers))

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        state = _state(self._path)
        if state == self._seen:
            return
        self._seen = state
        try:
            self._keys = read_keys(self._path)
        except ConfigError as error:
            logger.error("the keys of before stay: %s", error)
        else:
            logger.info("%d keys read again from %s", len(self._keys), self._path)


def read_keys(path: Path) -> tuple[KeyEntry, ...]:
    """Raises ConfigError for a file that is not there or not right; no hash is in its message."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from None
    if len(text) > _MOST_BYTES:
        raise _wrong(path, f"got more than {_MOST_BYTES} bytes")
    try:
        keys = KeysFile.model_validate(yaml.safe_load(text)).keys
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _wrong(path, f"is no YAML: {one_line(str(error))}") from None
    except RecursionError:
        raise _wrong(path, "is nested too deeply") from None
    except ValidationError as error:
        told = ((".".join(map(str, problem["loc"])), problem["msg"]) for problem in error.errors())
        raise _wrong(path, "; ".join(f"{where}: {what}" if where else what for where, what in told)) from None
    for what in ("name", "sha256"):
        values = [getattr(entry, what) for entry in keys]
        if len(set(values)) < len(values):
            raise _wrong(path, f"got the same {what} twice, wanted each once")
    return tuple(keys)


def _wrong(path: Path, what: str) -> ConfigError:
    return ConfigError(f"ingress.keys_file: {one_line(str(path))}: {what}")


def _state(path: Path) -> tuple[int, ...]:
    """Another one after every change, of a Secret's too, whose link then leads elsewhere."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_ino, found.st_dev, found.st_size)
