"""A result of `benchmarks.quality` as the record that a checkpoint brings for the ops page: what `cluster tune` writes.

python -m benchmarks.quality_parts.tuned benchmarks/results/quality_<hardware>_<date>.json > DIRECTORY/tuned.json
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from cluster.cli.tune.recommendation import Rated, advise, compare
from twotower.core import Mode

_FLOOR, _CONCURRENCY = 0.98, 1  # at more than 1 the benchmark has timed three γ only


def tuned(result: dict[str, Any]) -> dict[str, object]:
    """Quality as a share of `ar`'s mean accuracy, throughput the median of the rounds' ratios."""
    ways = [_rated(result, None, "ar")]
    for one in result["quality"]:
        swept = re.fullmatch(r"diffusion ([\d.]+)", one["way"])
        if swept is not None:
            ways.append(_rated(result, float(swept[1]), one["way"]))
    prompts = result["prompts"]
    advice = advise(ways, _FLOOR, prompts)
    verified = _rated(result, None, "verified")
    lossless = compare(verified, ways, advice)
    told = {"same_as_ar": lossless.same_as_ar, "recommended": lossless.mode is Mode.VERIFIED}
    return {
        "checkpoint": result["target"].split()[-1],
        "measured": result["setup"]["date"].split()[0],
        "hardware": result["setup"]["hardware"],
        "concurrency": _CONCURRENCY,
        "recommendation": advice.threshold,
        "quality_floor": _FLOOR,
        "quality": "answers",
        "prompts": prompts,
        "ways": [_shown(way) for way in ways],
        "verified": _shown(verified) | told,
    }


def _rated(result: dict[str, Any], threshold: float | None, name: str) -> Rated:
    [quality] = [one for one in result["quality"] if one["way"] == name]
    kept = quality["retained_ratio_of_means"]
    speeds, ars = _speeds(result, name), _speeds(result, "ar")
    return Rated(
        threshold, quality["mean_accuracy"], kept["value"], kept["low"], kept["high"], quality["identical"],
        statistics.median(speeds),
        statistics.median(ours / theirs for ours, theirs in zip(speeds, ars, strict=True)), quality["tokens_per_step"],
    )  # fmt: skip


def _speeds(result: dict[str, Any], name: str) -> list[float]:
    """Tokens per second, round by round: of short answers and long ones together."""
    runs = [one for one in result["speed"] if one["way"] == name and one["concurrency"] == _CONCURRENCY]
    rounds = [[one for one in runs if one["round"] == number] for number in sorted({one["round"] for one in runs})]
    return [sum(one["num_tokens"] for one in each) / sum(one["seconds"] for one in each) for each in rounds]


def _shown(way: Rated) -> dict[str, object]:
    """Without agreement, of which the benchmark knows only whether it is whole."""
    names = ("threshold", "accuracy", "quality", "low", "high", "tokens_per_s", "times_ar", "tokens_per_step")
    values = {name: getattr(way, name) for name in names}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


if __name__ == "__main__":
    print(json.dumps(tuned(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), indent=1))
