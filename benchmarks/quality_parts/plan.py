"""What is asked of a target: the grid of families and ways, and the sample that speed is measured on."""

from collections.abc import Sequence
from dataclasses import dataclass

from twotower.core import Mode
from twotower.demo.corpus import Instance, held_out
from twotower.demo.families import FAMILIES
from twotower.demo.scores import AR, USUAL, Way, every_way

QUALITY_CONCURRENCY = 16
BLOCK = 16
LONG_TOKENS = 128  # of an answer that goes on past eos
_FORM = 2  # of what a run keeps
_PER_CLIENT = 8  # requests of a run of speed, at least


@dataclass(frozen=True)
class Plan:
    """`per_family` instances for quality, `sample_per_family` for speed, `rounds` over all of the speed runs."""

    ways: tuple[Way, ...] = tuple(every_way())
    per_family: int = 200
    concurrency: tuple[int, ...] = (1, 4, 16)
    sample_per_family: int = 4
    rounds: int = 3
    families: tuple[str, ...] = tuple(FAMILIES)

    @classmethod
    def quick(cls) -> "Plan":
        """A first look."""
        ways = (AR, *(Way(Mode.DIFFUSION, threshold) for threshold in (0.6, 0.8, 0.95)))
        return cls(ways, per_family=16, concurrency=(1, 16), sample_per_family=2, rounds=1)

    def instances(self, family: str) -> list[Instance]:
        """What is asked for quality, the same of every way."""
        return held_out(family, self.per_family)

    def sample(self) -> list[Instance]:
        """What is asked for speed: all families in turn, the same in every run, none of the quality ones."""
        columns = [held_out(family, self.sample_per_family, after=self.per_family) for family in self.families]
        return [column[i] for i in range(self.sample_per_family) for column in columns]

    def timed(self, concurrency: int) -> list[Instance]:
        """What a run of speed asks: the sample, so often that the clients are busy together for most of the run."""
        sample = self.sample()
        return sample * -(-_PER_CLIENT * concurrency // len(sample))

    def speed_ways(self, concurrency: int) -> Sequence[Way]:
        """All thresholds at concurrency 1, which the curve is drawn from; a few beyond."""
        if concurrency == 1:
            return [way for way in self.ways if way.mode is not Mode.MOCK_AR]
        return self.few_ways()

    def few_ways(self) -> Sequence[Way]:
        few = (AR, Way(Mode.DIFFUSION, 0.6), USUAL, Way(Mode.DIFFUSION, 0.95))
        return [way for way in few if way in self.ways]

    def about(self) -> dict[str, object]:
        """What decides the questions. Not the number of rounds: a record may get more of them."""
        return {
            "form of the record": _FORM,
            "ways": [str(way) for way in self.ways],
            "families": list(self.families),
            "instances per family": self.per_family,
            "concurrency": list(self.concurrency),
            "timed instances per family": self.sample_per_family,
            "tokens of a long answer": LONG_TOKENS,
        }

    @property
    def num_runs(self) -> int:
        """Squares of quality and runs of speed together."""
        speed = sum(len(self.speed_ways(concurrency)) for concurrency in self.concurrency)
        return len(self.families) * len(self.ways) + self.rounds * (speed + len(self.few_ways()))
