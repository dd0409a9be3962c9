"""What a long command has found so far, on disk line by line, so that a run that was cut short goes on where it was."""

import json
from collections.abc import Mapping
from pathlib import Path

from twotower.errors import ConfigError


class Journal:
    """Entries of a kind and one line of JSON; each is on disk before the next one is made.

    `about` says what is measured on what: a run goes on only with the same. `entries` are those that were there.
    Raises ConfigError where `path` cannot be written, holds a journal that is neither to be gone on with (`resume`)
    nor to be replaced (`overwrite`), or one of something else.
    """

    def __init__(self, path: Path, about: Mapping[str, object], resume: bool = False, overwrite: bool = False) -> None:
        self.entries: list[tuple[str, str]] = []
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            there = path.exists() and path.stat().st_size > 0
            if there and not (resume or overwrite):
                raise ConfigError(f"{path}: holds an earlier run; --resume goes on with it, --overwrite begins anew")
            self.resumed = there and resume
            if self.resumed:
                self._read(about)
            self._file = path.open("a" if self.resumed else "w", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
        if not self.resumed:
            self.add("about", json.dumps(about))

    def add(self, kind: str, line: str) -> None:
        self._file.write(f"{kind} {line}\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """All of it is told elsewhere."""
        self.close()
        self._path.unlink()

    def _read(self, about: Mapping[str, object]) -> None:
        """A line that a killed run left half written is dropped, and found again."""
        whole = self._path.read_text(encoding="utf-8").rpartition("\n")[0]
        lines = [(kind, line) for kind, _, line in (each.partition(" ") for each in whole.splitlines())]
        if not lines or lines[0][0] != "about":
            raise ConfigError(f"{self._path}: cannot be gone on with: it does not say what it is about")
        self._compare(json.loads(lines[0][1]), json.loads(json.dumps(about)))
        self._path.write_text(whole + "\n", encoding="utf-8")
        self.entries = lines[1:]

    def _compare(self, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
        for name in wanted:
            if found.get(name) != wanted[name]:
                raise ConfigError(
                    f"{self._path}: cannot be gone on with: {name} was {found.get(name)}, now it is {wanted[name]}"
                )
