"""A run as a picture: tokens a second and latency by load, a line a mode. matplotlib is optional."""

from collections.abc import Sequence
from pathlib import Path

from twotower.commands.bench.figures import Figures
from twotower.errors import ConfigError


def draw(figures: Sequence[Figures], path: Path) -> None:
    """Raises ConfigError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(f"no plot {path}: matplotlib is not installed; pip install matplotlib") from None
    loads = list(dict.fromkeys(one.load for one in figures))
    figure = Figure(figsize=(10, 4), layout="constrained")
    rates, times = figure.subplots(1, 2)
    for mode in dict.fromkeys(one.mode for one in figures):
        ours = [one for one in figures if one.mode == mode]
        places = [loads.index(one.load) for one in ours]
        told = [one.tokens_per_s for one in ours]
        around = [[one.mean - one.low for one in told], [one.high - one.mean for one in told]]
        rates.errorbar(places, [one.mean for one in told], yerr=around, marker="o", capsize=3, label=mode)
        p50, p99 = ([getattr(one.latency, name) * 1000 for one in ours] for name in ("p50", "p99"))
        [line] = times.plot(places, p50, marker="o", label=f"{mode}, p50")
        times.plot(places, p99, marker="^", linestyle=":", color=line.get_color(), label=f"{mode}, p99")
    for axes, name in ((rates, "tokens per second"), (times, "latency, ms")):
        axes.set_xticks(range(len(loads)), loads)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
