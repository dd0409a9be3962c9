"""What the rounds say, as markdown, and their stalls as a picture."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.chaos_parts.faults import PHASES, Round
from benchmarks.reference.report import bullets, table

_COLORS = dict(zip(PHASES, ("#1f6f8b", "#e08e45", "#7a9e48", "#b04a5a"), strict=True))
_WORDS = """\
- faults: those that struck; met: in so many of them a request of that phase went on elsewhere because of it.
- phase, as a client sees it: prefill, before a request's first event (its prompt and its first block); commit, within
  5 ms of an event; step, between events; resume, 0.4 s after another process was killed, while requests are going on
  elsewhere.
- stall: the longest time without an event of a stream that was under way and went on elsewhere, from the fault on.
  Where none went on elsewhere: of all streams that were under way.
- whole: until all cells answer with all their towers, and `/ready` says so.
- failed: ended with an error, or not at all. changed: other tokens, text, usage or log-probabilities than the library
  gives in one process. Near ties, where fp32 may decide otherwise (margin below 1e-5), count apart.
- left over: once idle, processes of no cell, placement groups of no cell, held requests, slots or pages.
"""


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def render(title: str, rounds: Sequence[Round], setting: dict[str, str], picture: Path | None) -> str:
    parts = [f"# {title}", bullets(setting), _summary(rounds), _WORDS, _by_kind(rounds)]
    again = [done for done in rounds if done.fault.role in ("router", "proxy")]
    if again:
        parts.append(_retries(again))
    wrong = [f"- {done.fault}: {text}" for done in rounds for text in _wrongs(done)]
    parts.append("## What went wrong\n\n" + ("\n".join(wrong) or "Nothing."))
    if picture is not None:
        parts.append(f"![stalls]({picture.name})")
    return "\n\n".join(parts) + "\n"


def _summary(rounds: Sequence[Round]) -> str:
    asked = [asked for done in rounds for asked in done.asked]
    stalls = [stall for done in rounds for stall in done.stalls if done.fault.role not in ("router", "proxy")]
    counts = {name: sum(a.outcome.startswith(name) for a in asked) for name in ("failed", "changed", "near tie")}
    told = ", ".join(f"{number} {name}" for name, number in counts.items())
    shown = f"stall p50 {quantile(stalls, 0.5):.2f} s, p99 {quantile(stalls, 0.99):.2f} s" if stalls else "no stalls"
    left = sum(bool(done.wrong) for done in rounds)
    resumed = sum(done.resumed for done in rounds)
    return (
        f"**{len(rounds)} faults, {len(asked)} requests, {resumed} of them went on elsewhere: {told}; "
        f"{left} faults with something left over; {shown}.**"
    )


def _by_kind(rounds: Sequence[Round]) -> str:
    rows = []
    for kind in dict.fromkeys(done.fault.kind for done in rounds):
        for phase in PHASES:
            some = [done for done in rounds if (done.fault.kind, done.fault.phase) == (kind, phase)]
            if some:
                rows.append([kind, phase, *_row(some)])
    head = "struck,phase,faults,met,requests,resumed,failed,changed,near ties,stall p50 s,p99 s,whole s,left over"
    return table(head.split(","), rows)


def _row(some: Sequence[Round]) -> list[str]:
    stalls = [stall for done in some for stall in done.stalls]
    counts = [sum(len(done.outcomes(name)) for done in some) for name in ("failed", "changed", "near tie")]
    return [
        str(len(some)),
        str(sum(done.met for done in some)),
        str(sum(len(done.asked) for done in some)),
        str(sum(done.resumed for done in some)),
        *map(str, counts),
        f"{quantile(stalls, 0.5):.2f}" if stalls else "–",
        f"{quantile(stalls, 0.99):.2f}" if stalls else "–",
        f"{statistics.median(done.whole_s for done in some):.1f}",
        str(sum(len(done.wrong) for done in some)),
    ]


def _wrongs(done: Round) -> Iterable[str]:
    """What was left over, and each way to fail once, with the first request that failed so."""
    yield from done.wrong
    bad = [*done.outcomes("failed"), *done.outcomes("changed")]
    for outcome, number in Counter(asked.outcome for asked in bad).items():
        first = next(asked for asked in bad if asked.outcome == outcome)
        question, sent, ended = first.question, first.sent - done.at, first.ended - done.at
        how = f"{question.face}, {question.mode or 'scores'}, {'stream' if question.is_stream else 'whole'}"
        yield f"{number} × {outcome} ({how}; {len(first.events)} events; sent {sent:+.1f} s, ended {ended:+.1f} s)"


def _retries(rounds: Sequence[Round]) -> str:
    """How soon clients heard of a router's or a proxy's end, and whether their second try was right."""
    rows = []
    for done in rounds:
        hurt = [asked for asked in done.asked if asked.errors and asked.sent < done.at]
        heard = [asked.errors[0][0] - done.at for asked in hurt]
        said = sorted({asked.errors[0][1].split(":", 1)[1].strip()[:90] for asked in hurt})
        right = sum(asked.outcome in ("right", "near tie") for asked in hurt)
        again = [asked.ended - asked.errors[0][0] for asked in hurt]
        rows.append(
            [
                str(done.fault), str(len(hurt)),
                f"{quantile(heard, 0.5):.2f}, {max(heard):.2f}" if heard else "–",
                f"{right} of {len(hurt)}", f"{max(again):.1f}" if again else "–", "; ".join(said) or "–",
            ]
        )  # fmt: skip
    head = ["struck", "requests cut", "told after s: p50, worst", "right on retry", "slowest retry s", "told"]
    return "## Routers and proxies: the client asks again under the same request_id\n\n" + table(head, rows)


def plot(rounds: Sequence[Round], path: Path) -> None:
    """Each stall a point, by what was struck."""
    kinds = list(dict.fromkeys(done.fault.kind for done in rounds))
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(kinds) + 1.6), layout="constrained")
    for done in rounds:
        offset = (PHASES.index(done.fault.phase) - 1.5) * 0.18
        places = [kinds.index(done.fault.kind) + offset] * len(done.stalls)
        axes.plot(done.stalls, places, "o", color=_COLORS[done.fault.phase], alpha=0.55, ms=4)
    for phase, color in _COLORS.items():
        axes.plot([], [], "o", color=color, label=phase)
    axes.axvline(5.0, color="#333333", lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    axes.set_xlabel("stall, s (dotted: the aim for the 99th percentile)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)
