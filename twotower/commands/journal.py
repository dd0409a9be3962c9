"""The findings of a long command, on disk line by line: a run that was cut short continues from them."""

import json
from collections.abc import Mapping
from pathlib import Path

from twotower.errors import ConfigError


class Journal:
    """Entries with a kind and one line of JSON; each is on disk before the next one is made.

    `about` names the experiment. `entries` are those of the earlier run; a half-written line of a killed run is
    dropped. Raises ConfigError if `path` cannot be written, or if the file
    - holds entries, and neither `resume` nor `overwrite` is given;
    - is to be resumed, and is empty or belongs to another experiment.
    """

    def __init__(self, path: Path, about: Mapping[str, object], resume: bool = False, overwrite: bool = False) -> None:
        self.entries: list[tuple[str, str]] = []
        self._path, self._about = path, json.dumps(about)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            there = path.exists() and path.stat().st_size > 0
            if there and not (resume or overwrite):
                raise ConfigError(f"{path}: holds an earlier run; --resume continues it, --overwrite replaces it")
            if resume and not there:
                raise ConfigError(f"{path}: --resume: there is no earlier run to continue")
            if resume:
                self._read()
            self._file = path.open("a" if resume else "w", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from error

    @property
    def resumed(self) -> bool:
        """Whether its entries come from more than one run."""
        return bool(self.entries)

    def add(self, kind: str, line: str) -> None:
        if self._file.tell() == 0:
            self._file.write(f"about {self._about}\n")
        self._file.write(f"{kind} {line}\n")
        self._file.flush()

    def close(self) -> None:
        """Removes a journal without findings."""
        empty = self._file.tell() == 0
        self._file.close()
        if empty:
            self._path.unlink()

    def remove(self) -> None:
        """Called when the findings have been written elsewhere."""
        self._file.close()
        self._path.unlink()

    def _read(self) -> None:
        whole, end, _ = self._path.read_bytes().rpartition(b"\n")
        lines = [(kind, line) for kind, _, line in (each.partition(" ") for each in whole.decode().splitlines())]
        if not lines or lines[0][0] != "about":
            raise ConfigError(f"{self._path}: cannot be resumed: its first line does not name the experiment")
        found, wanted = json.loads(lines[0][1]), json.loads(self._about)
        for name in wanted:
            if found.get(name) != wanted[name]:
                raise ConfigError(
                    f"{self._path}: cannot be resumed: {name} was {found.get(name)}, now it is {wanted[name]}"
                )
        with self._path.open("r+b") as file:
            file.truncate(len(whole) + len(end))
        self.entries = lines[1:]
