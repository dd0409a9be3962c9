"""What a long command has found so far, on disk line by line, so that a run that was cut short goes on where it was."""

import json
from collections.abc import Mapping
from pathlib import Path

from twotower.errors import ConfigError


class Journal:
    """Entries of a kind and one line of JSON; each is on disk before the next one is made.

    `about` says what is found on what: a run goes on only with the same. `entries` are those that were there; a line
    that a killed run left half written is dropped, to be found again. Raises ConfigError where `path` cannot be
    written, holds entries that are neither to be gone on with (`resume`) nor to be replaced (`overwrite`), holds those
    of something else, or none to go on with.
    """

    def __init__(self, path: Path, about: Mapping[str, object], resume: bool = False, overwrite: bool = False) -> None:
        self.entries: list[tuple[str, str]] = []
        self._path, self._about = path, json.dumps(about)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            there = path.exists() and path.stat().st_size > 0
            if there and not (resume or overwrite):
                raise ConfigError(f"{path}: holds an earlier run; --resume goes on with it, --overwrite begins anew")
            if resume and not there:
                raise ConfigError(f"{path}: --resume: there is no earlier run to go on with")
            if resume:
                self._read()
            self._file = path.open("a" if resume else "w", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from error

    @property
    def resumed(self) -> bool:
        """What it holds comes from more than one sitting."""
        return bool(self.entries)

    def add(self, kind: str, line: str) -> None:
        if self._file.tell() == 0:
            self._file.write(f"about {self._about}\n")
        self._file.write(f"{kind} {line}\n")
        self._file.flush()

    def close(self) -> None:
        """A journal in which nothing was found is in nobody's way."""
        empty = self._file.tell() == 0
        self._file.close()
        if empty:
            self._path.unlink()

    def remove(self) -> None:
        """All of it is told elsewhere."""
        self._file.close()
        self._path.unlink()

    def _read(self) -> None:
        whole, end, _ = self._path.read_bytes().rpartition(b"\n")
        lines = [(kind, line) for kind, _, line in (each.partition(" ") for each in whole.decode().splitlines())]
        if not lines or lines[0][0] != "about":
            raise ConfigError(f"{self._path}: cannot be gone on with: it does not say what it is about")
        found, wanted = json.loads(lines[0][1]), json.loads(self._about)
        for name in wanted:
            if found.get(name) != wanted[name]:
                raise ConfigError(
                    f"{self._path}: cannot be gone on with: {name} was {found.get(name)}, now it is {wanted[name]}"
                )
        with self._path.open("r+b") as file:
            file.truncate(len(whole) + len(end))
        self.entries = lines[1:]
