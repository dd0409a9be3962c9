"""What is asked of a target: the grid of families and ways, and the samples that speed is measured on."""

from collections.abc import Sequence
from dataclasses import dataclass

from twotower.core import Mode
from twotower.demo.corpus import Instance, held_out
from twotower.demo.families import FAMILIES, LONG
from twotower.demo.scores import AR, USUAL, VERIFIED, Way, every_way

QUALITY_CONCURRENCY = 16
BLOCK = 16
_FORM = 3  # of what a run keeps
_PER_CLIENT = 8  # requests of a run of speed, at least
_FEWER_LONG = 4  # a family with long answers is asked so many times fewer of them


@dataclass(frozen=True)
class Plan:
    """`per_family` instances for quality, `sample_per_family` for speed, `rounds` over all of the speed runs. Families
    with long answers and those with short ones are timed apart.
    """

    ways: tuple[Way, ...] = tuple(every_way())
    per_family: int = 200
    concurrency: tuple[int, ...] = (1, 4, 16)
    sample_per_family: int = 4
    rounds: int = 3
    families: tuple[str, ...] = tuple(FAMILIES)

    @classmethod
    def quick(cls) -> "Plan":
        """A first look."""
        ways = (AR, VERIFIED, *(Way(Mode.DIFFUSION, threshold) for threshold in (0.6, 0.8, 0.95)))
        return cls(ways, per_family=16, concurrency=(1, 16), sample_per_family=2, rounds=1)

    @property
    def lengths(self) -> list[bool]:
        """Whether answers are long, of each of the groups of families that there are."""
        return sorted({family in LONG for family in self.families})

    def group(self, long: bool) -> list[str]:
        """The families with long answers, or the others."""
        return [family for family in self.families if (family in LONG) == long]

    def instances(self, family: str) -> list[Instance]:
        """What is asked for quality, the same of every way."""
        return held_out(family, self._marked(family))

    def sample(self, long: bool) -> list[Instance]:
        """What is asked for speed: a group's families in turn, the same in every run, none of the quality ones."""
        number = self.sample_per_family
        columns = [held_out(family, number, after=self._marked(family)) for family in self.group(long)]
        return [column[i] for i in range(number) for column in columns]

    def timed(self, concurrency: int, long: bool) -> list[Instance]:
        """What a run of speed asks: the sample, so often that the clients are busy together for most of the run."""
        sample = self.sample(long)
        return sample * -(-_PER_CLIENT * concurrency // len(sample))

    def _marked(self, family: str) -> int:
        return max(1, self.per_family // _FEWER_LONG) if family in LONG else self.per_family

    def speed_ways(self, concurrency: int) -> Sequence[Way]:
        """All thresholds at concurrency 1, which the curve is drawn from; a few beyond."""
        if concurrency == 1:
            return [way for way in self.ways if way.mode is not Mode.MOCK_AR]
        return self.few_ways()

    def few_ways(self) -> Sequence[Way]:
        few = (AR, VERIFIED, Way(Mode.DIFFUSION, 0.6), USUAL, Way(Mode.DIFFUSION, 0.95))
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
        }

    @property
    def num_runs(self) -> int:
        """Squares of quality and runs of speed together."""
        speed = sum(len(self.speed_ways(concurrency)) for concurrency in self.concurrency)
        return len(self.families) * len(self.ways) + self.rounds * speed * len(self.lengths)
