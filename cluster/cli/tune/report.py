"""The sweep as a person reads it: a table with bars, the advice in words, and a picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.cli.tune.questions import Question
from cluster.cli.tune.recommendation import Advice, Rated, advise, rate
from cluster.cli.tune.sweep import Pass
from twotower.errors import ConfigError

_BAR = 24
_HEAD = "               quality     95 % interval   agrees   tokens/s   × ar  tokens/step"


@dataclass(frozen=True)
class Findings:
    """A sweep's figures and the advice that follows. `by_answers`: quality is exact answers, not agreement with ar."""

    rated: Sequence[Rated]
    advice: Advice
    floor: float
    prompts: int
    by_answers: bool
    asked_again: int
    resumed: bool

    @classmethod
    def of(
        cls, questions: Sequence[Question], passes: Sequence[Pass], floor: float, resumed: bool = False
    ) -> "Findings":
        rated = rate(questions, passes)
        by_answers = questions[0].answer is not None
        again = sum(one.asked_again for one in passes)
        return cls(rated, advise(rated, floor, len(questions)), floor, len(questions), by_answers, again, resumed)

    def figures(self) -> dict[str, object]:
        """All of it as JSON."""
        return {
            "recommendation": self.advice.threshold,
            "more_prompts": self.advice.more_prompts,
            "slower_than_ar": self.advice.slower_than_ar,
            "quality_floor": self.floor,
            "quality": "answers" if self.by_answers else "agreement",
            "prompts": self.prompts,
            "asked_again": self.asked_again,
            "resumed": self.resumed,
            "ways": [asdict(one) for one in self.rated],
        }

    def text(self) -> str:
        """Table and advice."""
        what = "exact answers, as a share of ar's" if self.by_answers else "answers that are ar's, token for token"
        head = [f"{self.prompts} prompts, temperature 0; quality: {what}; floor {_percent(self.floor)}"]
        if self.by_answers:
            head.append(f"ar answers {_percent(self.rated[0].accuracy or 0.0)} of them right")
        if self.asked_again:
            head.append(
                f"the service was full or had no cell {self.asked_again} times, and was asked again; speeds are too low"
            )
        if self.resumed:
            head.append("measured in several runs (--resume): the speeds may be of different days")
        return "\n".join([*head, "", _HEAD, *map(self._row, self.rated), "", *self._advice()])

    def draw(self, path: Path) -> None:
        """Quality over tokens per second, γ along the curve. Raises ConfigError where matplotlib is missing."""
        try:
            import matplotlib
        except ImportError:
            raise ConfigError("--output draws with matplotlib: pip install 'twotower[dev]'") from None
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
        swept = self.rated[1:]
        speeds, values = [one.tokens_per_s for one in swept], [100 * one.quality for one in swept]
        ends = [[100 * (one.quality - one.low) for one in swept], [100 * (one.high - one.quality) for one in swept]]
        axes.errorbar(speeds, values, yerr=ends, fmt="o-", color="#1f6f8b", ecolor="#a9d0da", capsize=3)
        axes.plot([self.rated[0].tokens_per_s], [100 * self.rated[0].quality], "s", color="#333333")
        for one in self.rated:
            weight = "bold" if self._is_advised(one) else "normal"
            place = (one.tokens_per_s, 100 * one.quality)
            name = _name(one.threshold)
            axes.annotate(name, place, (0, -17), textcoords="offset points", ha="center", fontweight=weight)
        axes.margins(0.08, 0.15)
        axes.axhline(100 * self.floor, color="#333333", lw=0.8, ls=":")
        axes.set_xlabel("tokens per second, all prompts together")
        axes.set_ylabel("quality, % of ar's")
        axes.grid(alpha=0.25)
        figure.savefig(path, dpi=130)
        plt.close(figure)

    def _row(self, one: Rated) -> str:
        fastest = max(other.tokens_per_s for other in self.rated)
        interval = f"{_percent(one.low)}–{_percent(one.high)}"
        bar = "█" * max(1, round(_BAR * one.tokens_per_s / fastest))
        return (
            f"{'>' if self._is_advised(one) else ' '} {_name(one.threshold):9} {_percent(one.quality):>9}  "
            f"{interval:>16}  {_percent(one.agreement):>7}  {one.tokens_per_s:9.1f}  {one.times_ar:5.2f}  "
            f"{one.tokens_per_step:11.2f}  {bar}"
        )

    def _is_advised(self, one: Rated) -> bool:
        return one.threshold is not None and one.threshold == self.advice.threshold

    def _advice(self) -> list[str]:
        advice = self.advice
        if advice.threshold is None:
            best = max(self.rated[1:], key=lambda one: one.quality)
            return [
                f"No γ keeps {_percent(self.floor)}: the best is {_name(best.threshold)} with "
                f"{_percent(best.quality)}. Take ar, or a lower floor.",
                "  per request: --mode ar          for all: decode.mode=ar",
            ]
        said = [
            f"Take γ {advice.threshold:g}.",
            f"  per request: --confidence-threshold {advice.threshold:g}"
            f"          for all: decode.confidence_threshold={advice.threshold:g}",
        ]
        low = next(one.low for one in self.rated if self._is_advised(one))
        if low < self.floor:
            more = f"; about {advice.more_prompts} more prompts would settle it" if advice.more_prompts else ""
            said.append(f"Not certain: the interval begins at {_percent(low)}, below the floor{more}.")
        if advice.slower_than_ar:
            said.append(
                "At this concurrency ar was faster than every γ that keeps the floor: take ar, or ask fewer at once."
            )
        return said


def _name(threshold: float | None) -> str:
    return "ar" if threshold is None else f"γ {threshold:g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
