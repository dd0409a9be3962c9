"""Requests and the times of their events. Times are seconds since the pass began."""

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from twotower.commands.bench.load import Load
from twotower_client import Usage


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. `due_s`: when it should be sent; latencies count from this time. `sent_s`: when it was sent.
    `blocks_s`: when each block of its answer arrived. `error`: the code of its failure.
    """

    number: int
    due_s: float
    sent_s: float
    end_s: float
    blocks_s: tuple[float, ...] = ()
    usage: Usage = field(default_factory=Usage)
    error: str | None = None

    @property
    def latency_s(self) -> float:
        return self.end_s - self.due_s

    @property
    def first_s(self) -> float:
        """To the first tokens."""
        return self.blocks_s[0] - self.due_s

    @property
    def gaps_s(self) -> list[float]:
        """Between blocks."""
        return [later - earlier for earlier, later in pairwise(self.blocks_s)]

    @property
    def late_s(self) -> float:
        """How long the load generator delayed it."""
        return self.sent_s - self.due_s

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Pass:
    """One load in one mode, once. `mode` None: the service's default. `client_cpu_s`: CPU time of this process."""

    mode: str | None
    load: Load
    round: int
    samples: tuple[Sample, ...]
    seconds: float
    most_in_flight: int
    client_cpu_s: float

    @property
    def good(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.error is None]

    @property
    def tokens(self) -> int:
        return sum(sample.usage.completion_tokens for sample in self.good)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def requests_per_s(self) -> float:
        return len(self.good) / self.seconds
