"""The file of keys: the callers and their limits. The file holds the SHA-256 of each key, not the key.

A key is drawn here from 256 random bits. So a plain hash reveals nothing, and neither does the time of a look-up.
"""

import hashlib
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from cluster.rereading import Rereading
from cluster.runs.callers import Caller, KeyRefused, Limits
from cluster.sections import Count, Section
from twotower.core import MAX_PRIORITY, MIN_PRIORITY
from twotower.errors import ConfigError

PREFIX = "tt-"
_MOST_BYTES, _MOST_KEYS = 256 * 2**10, 1000


class KeyEntry(Section):
    """One key: its name, shown in logs and metrics, its hash, and its limits over all routers."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    concurrent_requests: Count | None = None
    tokens_per_minute: Count | None = None
    priority_from: Annotated[int, Field(ge=MIN_PRIORITY, le=MAX_PRIORITY)] | None = None

    def limits(self, routers: int) -> Limits:
        """The limits at one of so many routers: equal parts of counted limits, rounded up."""

        def part(whole: int | None) -> int | None:
            return None if whole is None else math.ceil(whole / routers)

        requests, tokens = self.concurrent_requests, self.tokens_per_minute
        return Limits(part(requests), part(tokens), self.priority_from, (requests, tokens))

    def written(self) -> str:
        """The entry in the file's list."""
        given = self.model_dump(exclude_none=True)
        return "".join(f"  {line}\n" for line in yaml.safe_dump([given], sort_keys=False).splitlines())


class KeysFile(Section):
    """The whole file."""

    keys: Annotated[list[KeyEntry], Field(min_length=1, max_length=_MOST_KEYS)]


class _Loader(yaml.SafeLoader):
    """YAML without dates: a name may look like one."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """A Door for callers with a key of the file, which is read again soon after it changes."""

    def __init__(self, path: Path, routers: int = 1) -> None:
        """Raises ConfigError."""
        self._path, self._routers = path, routers
        self._file = Rereading("keys", [path], self._read)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(caller.name for caller in self._file.now.values())

    @property
    def fault(self) -> str:
        return self._file.fault

    def caller(self, key: str | None, address: str) -> Caller:
        if key is None:
            raise KeyRefused("this service requires a key: send the header `Authorization: Bearer KEY`", "no key")
        caller = self._file.now.get(hash_of(key))
        if caller is None:
            raise KeyRefused("the key of this call is not known to this service", "unknown key")
        return caller

    async def watch(self) -> None:
        """Runs forever."""
        await self._file.watch()

    def look(self) -> None:
        self._file.look()

    def _read(self) -> Mapping[str, Caller]:
        entries = read_keys(self._path)
        return {entry.sha256: Caller(entry.name, entry.limits(self._routers), has_key=True) for entry in entries}


def read_keys(path: Path) -> tuple[KeyEntry, ...]:
    """Raises ConfigError for a missing or wrong file. The message repeats nothing of its content."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from None
    if len(text) > _MOST_BYTES:
        raise _wrong(path, f"got more than {_MOST_BYTES} bytes")
    try:
        keys = KeysFile.model_validate(_parsed(path, text)).keys
    except ValidationError as error:
        raise _wrong(path, "; ".join(map(_problem, error.errors()[:8]))) from None
    for what in ("name", "sha256"):
        values = [getattr(entry, what) for entry in keys]
        if len(set(values)) < len(values):
            raise _wrong(path, f"got the same {what} twice, wanted each once")
    return tuple(keys)


def _parsed(path: Path, text: bytes) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise _wrong(path, f"is no YAML{where}: {error.problem}") from None
    except Exception as error:
        raise _wrong(path, f"is no YAML of keys: {type(error).__name__}") from None


def _problem(problem: Any) -> str:
    """The place and kind of the error, without the file's own words."""
    if problem["type"] == "extra_forbidden":
        where, what = problem["loc"][:-1], f"an unknown name; wanted some of {', '.join(KeyEntry.model_fields)}"
    else:
        where, what = problem["loc"], problem["msg"]
    return f"{'.'.join(map(str, where))}: {what}" if where else str(what)


def _wrong(path: Path, what: str) -> ConfigError:
    return ConfigError(f"ingress.keys_file: {path}: {what}")
