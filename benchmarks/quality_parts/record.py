"""What has been measured so far."""

import json
from dataclasses import asdict, astuple, dataclass, field

from twotower.commands.journal import Journal
from twotower.demo.scores import Score, from_json, to_json


@dataclass(frozen=True)
class Spent:
    """Of requests that came one after the other: how many, what they were given, and the seconds it took.

    `num_commits`: blocks that another one followed; in `verified` rounds, whose reads of the draft cost as much.
    """

    num_answers: int = 0
    num_tokens: int = 0
    num_steps: int = 0
    num_commits: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


@dataclass(frozen=True)
class Run:
    """One timed run of a sample. Seconds; `first_token_s` is the median. `num_steps`: 0 in the causal modes. `long`: of
    the families with long answers. `tasks`: the same by family, at concurrency 1."""

    way: str
    concurrency: int
    round: int
    seconds: float
    num_tokens: int
    num_steps: int
    first_token_s: float
    long: bool = False
    tasks: dict[str, Spent] = field(default_factory=dict)

    @classmethod
    def from_json(cls, line: str) -> "Run":
        plain = json.loads(line)
        return cls(**{**plain, "tasks": {family: Spent(**each) for family, each in plain["tasks"].items()}})

    @property
    def spent(self) -> Spent:
        """All tasks together."""
        return sum(self.tasks.values(), Spent())

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def key(self) -> tuple[str, int, int, bool]:
        return self.way, self.concurrency, self.round, self.long


class Record:
    """Scores and runs, in a journal."""

    def __init__(self, journal: Journal) -> None:
        self.scores: dict[tuple[str, str], Score] = {}
        self.runs: dict[tuple[str, int, int, bool], Run] = {}
        self._journal = journal
        for kind, line in journal.entries:
            if kind == "score":
                self._keep_score(from_json(line))
            else:
                self._keep_run(Run.from_json(line))

    @property
    def resumed(self) -> bool:
        """Measured in several runs."""
        return self._journal.resumed

    def add_score(self, score: Score) -> None:
        self._keep_score(score)
        self._journal.add("score", to_json(score))

    def add_run(self, run: Run) -> None:
        self._keep_run(run)
        self._journal.add("run", json.dumps(asdict(run)))

    def close(self) -> None:
        self._journal.close()

    def of(self, way: str, concurrency: int, long: bool = False) -> list[Run]:
        """The rounds of one kind of run, in order."""
        kind = (way, concurrency, long)
        return [run for run in self.runs.values() if (run.way, run.concurrency, run.long) == kind]

    def _keep_score(self, score: Score) -> None:
        self.scores[score.family, score.way] = score

    def _keep_run(self, run: Run) -> None:
        self.runs[run.key] = run
