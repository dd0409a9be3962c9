"""The two pictures: quality kept against throughput gained, and steps per block by task."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.quality_parts.report import SHORT_OR_LONG, Findings, blocks_of
from twotower.demo.scores import AR, USUAL, VERIFIED, Way, retained, tokens_per_step

_INK, _ACCENT, _OTHER = "#333333", "#1f6f8b", "#b5651d"
_SHADES = ("#1f6f8b", "#63a6b8", "#a9d0da", "#dcecf0")


def trade(findings: Findings, path: Path) -> None:
    """Quality kept, with its interval, over throughput ÷ `ar`'s at concurrency 1. Short and long answers each have a
    line of thresholds and a point for `verified`.
    """
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for long, color in zip(findings.plan.lengths, (_ACCENT, _OTHER), strict=False):
        ways = [(way, f"γ {way.confidence_threshold:g}") for way in findings.swept]
        _draw(axes, findings, ways, long, f"diffusion, {SHORT_OR_LONG[long]} answers", color, "o-")
        if VERIFIED in findings.plan.ways:
            _draw(axes, findings, [(VERIFIED, "")], long, f"verified, {SHORT_OR_LONG[long]} answers", color, "D")
    axes.margins(0.08, 0.15)
    axes.axhline(98.7, color=_INK, lw=0.8, ls=":")
    axes.text(0.01, 98.72, "98.7 %", transform=axes.get_yaxis_transform(), fontsize=8, va="bottom", color=_INK)
    axes.plot([1], [100], marker="s", color=_INK)
    axes.annotate("AR", (1, 100), xytext=(7, -3), textcoords="offset points", color=_INK)
    axes.set_xlabel("throughput at concurrency 1, times that of AR")
    axes.set_ylabel("quality kept, % of AR's mean accuracy")
    axes.set_title("What a lower threshold γ costs and brings, and what verification does", loc="left")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(
    axes: Axes, findings: Findings, ways: list[tuple[Way, str]], long: bool, label: str, color: str, form: str
) -> None:
    speeds = [statistics.median(findings.times_ar(way, 1, long)) for way, _ in ways]
    kept = [retained(findings.scores(way, long), findings.scores(AR, long)).of_means for way, _ in ways]
    values = [100 * each.value for each in kept]
    low = [100 * (each.value - each.low) for each in kept]
    high = [100 * (each.high - each.value) for each in kept]
    axes.errorbar(speeds, values, yerr=[low, high], fmt=form, color=color, capsize=3, lw=1.5, label=label, alpha=0.9)
    for speed, value, (_, name) in zip(speeds, values, ways, strict=True):
        place = (speed, value)
        axes.annotate(name, place, (-6, -4), textcoords="offset points", ha="right", va="top", color=_INK, fontsize=8)


def steps(findings: Findings, path: Path) -> None:
    """Mean steps of first, second, … blocks, tasks sorted by tokens per step."""
    per_step = {
        family: tokens_per_step([findings.record.scores[family, str(USUAL)]]) for family in findings.plan.families
    }
    families = sorted(per_step, key=lambda family: per_step[family])
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(families) + 1.4), layout="constrained")
    blocks = {family: blocks_of(findings, family, USUAL) for family in families}
    most = max(map(len, blocks.values()))
    height = 0.8 / most
    for block in range(most):
        places = [i + (block - (most - 1) / 2) * height for i in range(len(families))]
        widths = [blocks[family][block].mean_steps if block < len(blocks[family]) else 0.0 for family in families]
        axes.barh(places, widths, height, color=_SHADES[block % len(_SHADES)], label=f"block {block + 1}")
    axes.set_yticks(range(len(families)), [f"{family}  ({per_step[family]:.1f} tokens/step)" for family in families])
    axes.invert_yaxis()
    axes.set_xlabel("mean steps until the block is full (of at most 16)")
    axes.set_title(f"Steps per block by task, {USUAL}", loc="left")
    figure.legend(frameon=False, loc="outside right upper")
    axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)
