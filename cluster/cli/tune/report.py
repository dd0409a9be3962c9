"""The sweep as a person reads it: a table with bars, the advice in words, and a picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.cli.tune.questions import Question
from cluster.cli.tune.recommendation import Advice, Lossless, Rated, advise, compare, rate
from cluster.cli.tune.sweep import VERIFIED, Pass
from twotower.core import Mode
from twotower.errors import ConfigError

_BAR = 24
_HEAD = "               quality     95 % interval   agrees   tokens/s   × ar  tokens/step"


@dataclass(frozen=True)
class Findings:
    """A sweep's figures and the advice that follows. `by_answers`: quality is exact answers, not agreement with ar.

    `rated`: `ar`, then each γ. `verified` and `lossless`: None where the service does not serve that mode.
    """

    rated: Sequence[Rated]
    advice: Advice
    floor: float
    prompts: int
    by_answers: bool
    asked_again: int
    resumed: bool
    verified: Rated | None = None
    lossless: Lossless | None = None

    @classmethod
    def of(
        cls, questions: Sequence[Question], passes: Sequence[Pass], floor: float, resumed: bool = False
    ) -> "Findings":
        all_rated = dict(zip((one.way for one in passes), rate(questions, passes), strict=True))
        verified = all_rated.pop(VERIFIED, None)
        rated, prompts = list(all_rated.values()), len(questions)
        advice = advise(rated, floor, prompts)
        lossless = None if verified is None else compare(verified, rated, advice)
        by_answers, again = questions[0].answer is not None, sum(one.asked_again for one in passes)
        return cls(rated, advice, floor, prompts, by_answers, again, resumed, verified, lossless)

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
            **self._verified_figures(),
        }

    def _verified_figures(self) -> dict[str, object]:
        if self.verified is None or self.lossless is None:
            return {}
        told = {"same_as_ar": self.lossless.same_as_ar, "recommended": self._takes_verified}
        return {"verified": asdict(self.verified) | told}

    @property
    def _takes_verified(self) -> bool:
        return self.lossless is not None and self.lossless.mode is Mode.VERIFIED

    def text(self) -> str:
        """Table and advice."""
        what = "exact answers, as a share of ar's" if self.by_answers else "answers that are ar's, token for token"
        head = [f"{self.prompts} prompts, temperature 0; quality: {what}; floor {_percent(self.floor)}"]
        if self.by_answers:
            head.append(f"ar answers {_percent(self.rated[0].accuracy or 0.0)} of them right")
        if self.asked_again:
            head.append(
                f"the service was full or had no cell {self.asked_again} times: requests were repeated, speeds are low"
            )
        if self.resumed:
            head.append("measured in several runs (--resume): the speeds may be of different days")
        rows = [self._row(name, one) for name, one in self._named()]
        return "\n".join([*head, "", _HEAD, *rows, "", *self._lossless_advice(), *self._advice()])

    def _named(self) -> list[tuple[str, Rated]]:
        named = [(_name(one.threshold), one) for one in self.rated]
        return named if self.verified is None else [*named, ("verified", self.verified)]

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
        if self.verified is not None:
            axes.plot([self.verified.tokens_per_s], [100 * self.verified.quality], "D", color="#b3541e")
        for name, one in self._named():
            weight = "bold" if self._is_advised(one) else "normal"
            place = (one.tokens_per_s, 100 * one.quality)
            axes.annotate(name, place, (0, -17), textcoords="offset points", ha="center", fontweight=weight)
        axes.margins(0.08, 0.15)
        axes.axhline(100 * self.floor, color="#333333", lw=0.8, ls=":")
        axes.set_xlabel("tokens per second, all prompts together")
        axes.set_ylabel("quality, % of ar's")
        axes.grid(alpha=0.25)
        figure.savefig(path, dpi=130)
        plt.close(figure)

    def _row(self, name: str, one: Rated) -> str:
        fastest = max(other.tokens_per_s for _, other in self._named())
        interval = f"{_percent(one.low)}–{_percent(one.high)}"
        bar = "█" * max(1, round(_BAR * one.tokens_per_s / fastest))
        return (
            f"{'>' if self._is_advised(one) else ' '} {name:9} {_percent(one.quality):>9}  "
            f"{interval:>16}  {_percent(one.agreement):>7}  {one.tokens_per_s:9.1f}  {one.times_ar:5.2f}  "
            f"{one.tokens_per_step:11.2f}  {bar}"
        )

    def _is_advised(self, one: Rated) -> bool:
        if one is self.verified:
            return self._takes_verified
        return one.threshold is not None and one.threshold == self.advice.threshold

    def _lossless_advice(self) -> list[str]:
        """Whether to take `verified`, or what its being lossless costs."""
        if self.verified is None or self.lossless is None:
            return []
        if not self.lossless.same_as_ar:
            agrees = _percent(self.verified.agreement)
            return [
                f"verified should give ar's own answers, but only {agrees} of the tokens agree: near-ties, or a fault."
            ]
        other = _name(None if self.advice.slower_than_ar else self.advice.threshold)
        pace = f"{self.lossless.against:.2f} × the tokens per second of {other}"
        if self._takes_verified:
            return [
                f"Take verified: all answers are ar's own, at {pace}.",
                "  per request: --mode verified    for all: decode.mode=verified",
            ]
        return [f"verified is lossless: all answers are ar's own. That costs: {pace}."]

    def _advice(self) -> list[str]:
        advice = self.advice
        if advice.threshold is None:
            best = max(self.rated[1:], key=lambda one: one.quality)
            lost = (
                f"No γ keeps {_percent(self.floor)}: the best is {_name(best.threshold)} with {_percent(best.quality)}."
            )
            if self._takes_verified:
                return [lost]
            return [
                f"{lost} Take ar, or a lower floor.",
                "  per request: --mode ar          for all: decode.mode=ar",
            ]
        said = [
            f"{'Of diffusion, take' if self._takes_verified else 'Take'} γ {advice.threshold:g}.",
            f"  per request: --confidence-threshold {advice.threshold:g}"
            f"          for all: decode.confidence_threshold={advice.threshold:g}",
        ]
        low = next(one.low for one in self.rated if self._is_advised(one))
        if low < self.floor:
            more = f"; about {advice.more_prompts} more prompts would settle it" if advice.more_prompts else ""
            said.append(f"Not certain: the interval begins at {_percent(low)}, below the floor{more}.")
        if advice.slower_than_ar and not self._takes_verified:
            said.append(
                "At this concurrency ar was faster than every γ that keeps the floor: take ar, or ask fewer at once."
            )
        return said


def _name(threshold: float | None) -> str:
    return "ar" if threshold is None else f"γ {threshold:g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
