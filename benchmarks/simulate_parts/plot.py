"""Each scenario over time: cells and requests above, what first tokens took below."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.simulate_parts.scenarios import Ran
from twotower.commands.bench.figures import percentile

_WINDOW_S = 2.0


def plot(found: Sequence[Ran], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * max(2, len(found)), 6.4), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False, sharex="col")
    for column, ran in enumerate(found):
        above, below = axes[0][column], axes[1][column]
        moments = ran.result.moments
        times = [moment.at for moment in moments]
        for name in ("cells", "starting", "leaving", "running", "waiting"):
            values = [getattr(moment, name) for moment in moments]
            if any(values):
                above.plot(times, values, label=name)
        above.set_title(f"{ran.scenario.name}, {ran.routers} routers", fontsize=10)
        above.legend(frameon=False, fontsize=8)
        _first_tokens(below, ran)
        for one in (above, below):
            one.set_ylim(bottom=0)
            one.grid(alpha=0.3)
        below.set_xlabel("seconds")
    axes[0][0].set_ylabel("cells, requests")
    axes[1][0].set_ylabel("first token, s, by when it was due")
    figure.savefig(path, dpi=110)


def _first_tokens(axes: "object", ran: Ran) -> None:
    windows: dict[int, list[float]] = {}
    for one in ran.result.outcomes:
        if one.first is not None:
            windows.setdefault(int(one.due / _WINDOW_S), []).append(one.first - one.due)
    times = [_WINDOW_S * (window + 0.5) for window in sorted(windows)]
    for share, style in ((0.5, "-"), (0.99, ":")):
        values = [percentile(sorted(windows[window]), share) for window in sorted(windows)]
        axes.plot(times, values, style, label=f"p{100 * share:.0f}")  # type: ignore[attr-defined]
    axes.legend(frameon=False, fontsize=8)  # type: ignore[attr-defined]
