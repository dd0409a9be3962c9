"""What has been measured so far, on disk line by line, so that a run that was cut short goes on where it stopped."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from twotower.demo.scores import Score, from_json, to_json
from twotower.errors import ConfigError


@dataclass(frozen=True)
class Run:
    """One timed run of the sample. Seconds; `first_token_s` is the median. `num_steps`: 0 in the causal modes. `long`:
    answers went on past eos."""

    way: str
    concurrency: int
    round: int
    seconds: float
    num_tokens: int
    num_steps: int
    first_token_s: float
    long: bool = False

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def key(self) -> tuple[str, int, int, bool]:
        return self.way, self.concurrency, self.round, self.long


class Record:
    """Scores and runs. Each is on disk before the next one begins.

    `about` says what is measured on what: a record goes on only with the same. Raises ConfigError where `path` holds a
    record that is neither to be gone on with (`resume`) nor to be replaced (`overwrite`), or one of something else.
    """

    def __init__(self, path: Path, about: dict[str, object], resume: bool = False, overwrite: bool = False) -> None:
        self.scores: dict[tuple[str, str], Score] = {}
        self.runs: dict[tuple[str, int, int, bool], Run] = {}
        self._path, self._about = path, about
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists() and path.stat().st_size > 0
        if there and not (resume or overwrite):
            raise ConfigError(f"{path}: holds an earlier run; --resume goes on with it, --overwrite begins anew")
        self.resumed = there and resume
        if self.resumed:
            self._read()
        self._file = path.open("a" if self.resumed else "w", encoding="utf-8")
        if not self.resumed:
            self._write("about", json.dumps(about))

    def add_score(self, score: Score) -> None:
        self._keep_score(score)
        self._write("score", to_json(score))

    def add_run(self, run: Run) -> None:
        self._keep_run(run)
        self._write("run", json.dumps(asdict(run)))

    def close(self) -> None:
        self._file.close()

    def of(self, way: str, concurrency: int, long: bool = False) -> list[Run]:
        """The rounds of one kind of run, in order."""
        kind = (way, concurrency, long)
        return [run for run in self.runs.values() if (run.way, run.concurrency, run.long) == kind]

    def _read(self) -> None:
        for kind, text in self._lines():
            if kind == "about":
                self._compare(json.loads(text))
            elif kind == "score":
                self._keep_score(from_json(text))
            else:
                self._keep_run(Run(**json.loads(text)))

    def _compare(self, about: dict[str, object]) -> None:
        wanted: dict[str, object] = json.loads(json.dumps(self._about))
        for name in wanted:
            if about.get(name) != wanted[name]:
                raise ConfigError(
                    f"{self._path}: cannot be gone on with: {name} was {about.get(name)}, now it is {wanted[name]}"
                )

    def _keep_score(self, score: Score) -> None:
        self.scores[score.family, score.way] = score

    def _keep_run(self, run: Run) -> None:
        self.runs[run.key] = run

    def _write(self, kind: str, text: str) -> None:
        self._file.write(f"{kind} {text}\n")
        self._file.flush()

    def _lines(self) -> Iterator[tuple[str, str]]:
        """Whole lines; one that a killed run left half written is dropped and measured again."""
        whole = self._path.read_text(encoding="utf-8").rpartition("\n")[0]
        self._path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        for line in whole.splitlines():
            kind, _, text = line.partition(" ")
            yield kind, text
