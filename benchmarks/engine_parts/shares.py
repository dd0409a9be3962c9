"""Shares of time out of two recordings: who computed when, what a tick is made of, how long a commit is on its way."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.engine_parts.intervals import Interval, difference, intersection, total, union
from benchmarks.engine_parts.recorder import DECISION, DELIVERY, EXCHANGE, FORWARD, STEP, WRITING, Recording, Span, Tick


@dataclass(frozen=True, slots=True)
class TickParts:
    """Where the wall time of one tower's working ticks went, in shares of it; `cpu` is the CPU time's share."""

    ticks: int
    rows: float
    tick_s: float
    forward: float
    decision: float
    exchange: float
    rest: float
    cpu: float

    @property
    def outside_forward(self) -> float:
        return 1 - self.forward


@dataclass(frozen=True, slots=True)
class Overlap:
    """Shares of the time in which enough sequences were active, as the denoiser engine counts them.

    - `denoiser`, `context`: that tower was in a tick with work.
    - `neither`: neither tower computed (forward or decision).
    - `exchange`, a part of `neither`: sending, receiving, packing, unpacking, and waiting for messages on their way.
    - `on_the_way`, a part of `exchange`: no tick ran.
    - `delivery`, another part of `neither`: events went out between ticks. The rest is other work inside ticks.
    - `writing`: the link's thread wrote deltas, whatever else went on.
    """

    seconds: float
    denoiser: float
    context: float
    neither: float
    exchange: float
    on_the_way: float
    delivery: float
    writing: float
    rows: float
    active: float


def tick_parts(recording: Recording, forward_of_step: float = 1.0) -> TickParts | None:
    """None where the tower had nothing to do. `forward_of_step`: the share of a step that is no decision."""
    worked = [tick for tick in recording.ticks if tick.worked]
    if not worked:
        return None
    wall = sum(tick.seconds for tick in worked)
    within = union((tick.start, tick.end) for tick in worked)
    names = (FORWARD, STEP, DECISION, EXCHANGE)
    shares = {name: total(intersection(_of(recording.spans, name), within)) / wall for name in names}
    return TickParts(
        ticks=len(worked),
        rows=sum(tick.rows for tick in worked) / len(worked),
        tick_s=statistics.median(tick.seconds for tick in worked),
        forward=shares[FORWARD] + shares[STEP] * forward_of_step,
        decision=shares[DECISION] + shares[STEP] * (1 - forward_of_step),
        exchange=shares[EXCHANGE],
        rest=1 - sum(shares.values()),
        cpu=sum(tick.cpu_s for tick in worked) / wall,
    )


def overlap(recordings: Mapping[str, Recording], least_active: int) -> Overlap | None:
    """While at least `least_active` sequences were active; None if that never was."""
    denoiser, context = recordings["denoiser"], recordings["context"]
    when = _while_active(denoiser.ticks, least_active)
    seconds = total(when)
    if not seconds:
        return None
    ticking = {name: union((t.start, t.end) for t in r.ticks if t.worked) for name, r in recordings.items()}
    computing = union(
        [*_of(denoiser.spans, FORWARD, STEP, DECISION), *_of(context.spans, FORWARD, DECISION)],
    )
    idle = difference(when, computing)
    in_exchange = union([*_of(denoiser.spans, EXCHANGE, WRITING), *_of(context.spans, EXCHANGE)])
    in_a_tick = union([*ticking["denoiser"], *ticking["context"]])
    delivering = _of([*denoiser.spans, *context.spans], DELIVERY)
    on_the_way = difference(idle, union([*in_a_tick, *delivering]))
    worked = [tick for tick in denoiser.ticks if tick.worked and tick.active >= least_active]
    return Overlap(
        seconds=seconds,
        denoiser=total(intersection(when, ticking["denoiser"])) / seconds,
        context=total(intersection(when, ticking["context"])) / seconds,
        neither=total(idle) / seconds,
        exchange=total(union([*on_the_way, *intersection(idle, in_exchange)])) / seconds,
        on_the_way=total(on_the_way) / seconds,
        delivery=total(intersection(idle, delivering)) / seconds,
        writing=total(intersection(when, _of(denoiser.spans, WRITING))) / seconds,
        rows=statistics.fmean(tick.rows for tick in worked) if worked else 0.0,
        active=statistics.fmean(tick.active for tick in worked) if worked else 0.0,
    )


def crossings_ms(recordings: Mapping[str, Recording]) -> dict[str, list[float]]:
    """Milliseconds of every commit: on its way, at the context tower, its delta on its way back."""
    seen: dict[tuple[int, int], dict[str, float]] = {}
    for recording in recordings.values():
        for crossing in recording.crossings:
            seen.setdefault((crossing.sequence, crossing.start), {})[crossing.what] = crossing.at
    stages = {"to the context tower": ("submitted", "received"), "there": ("received", "sent")}
    stages["delta back, applied"] = ("sent", "polled")
    whole = [times for times in seen.values() if len(times) == 4]
    return {name: [(times[b] - times[a]) * 1e3 for times in whole] for name, (a, b) in stages.items()}


def step_gaps(recording: Recording, since: float, until: float, widest: int) -> list[float]:
    """Seconds between two forwards of the same slot, the later of which began within [since, until).

    Forwards of more than `widest` positions are prompt chunks and no steps.
    """
    last: dict[int, float] = {}
    gaps = []
    for span in recording.spans:
        if span.name not in (FORWARD, STEP) or span.width > widest:
            continue
        for slot in span.slots:
            if slot in last and since <= span.start < until:
                gaps.append(span.start - last[slot])
            last[slot] = span.start
    return gaps


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation; of one value, that value."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _of(spans: Iterable[Span], *names: str) -> list[Interval]:
    return union((span.start, span.end) for span in spans if span.name in names)


def _while_active(ticks: Sequence[Tick], least: int) -> list[Interval]:
    """From the start of a tick that left enough sequences active to the start of the next."""
    return union((tick.start, after.start) for tick, after in pairwise(ticks) if tick.active >= least)
