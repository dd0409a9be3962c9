"""The result as markdown. A median with the smallest and largest round in brackets."""

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.transport_parts.codecs import Cost
from benchmarks.transport_parts.faults import LIMIT_S, Faults
from benchmarks.transport_parts.pingpong import Trips
from benchmarks.transport_parts.seam import BEAT_S, BOUND, SILENCE_S
from benchmarks.transport_parts.sides import EVENTS, FLOOD, Load
from benchmarks.transport_parts.threads import NOTHING, Arrivals, Ticks, longer_s
from benchmarks.transport_parts.variants import BASELINE, VARIANTS, Variant

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Round:
    """One run of the load: the router's view, and CPU seconds of the cell."""

    load: Load
    cell_cpu_s: float

    @property
    def runs_per_s(self) -> float:
        return self.load.runs / self.load.wall_s

    def first_ms(self, share: float) -> float:
        ordered = sorted(self.load.first_s)
        return ordered[int(share * (len(ordered) - 1))] * 1e3

    @property
    def cell_us(self) -> float:
        return self.cell_cpu_s / (self.load.runs * EVENTS) * 1e6

    @property
    def router_us(self) -> float:
        return self.load.cpu_s / (self.load.runs * EVENTS) * 1e6


@dataclass(slots=True)
class Results:
    """Everything measured, by variant; lists are rounds."""

    loads: dict[tuple[int, str], list[Round]] = field(default_factory=dict)
    faults: dict[str, list[Faults]] = field(default_factory=dict)
    threads: dict[str, list[tuple[Ticks, Arrivals | None]]] = field(default_factory=dict)
    pingpong: dict[str, list[Trips]] = field(default_factory=dict)
    codecs: dict[str, list[Cost]] = field(default_factory=dict)


def render(results: Results, variants: Sequence[Variant], loop: str, load_before: float, command: str) -> str:
    parts = [
        "# Transports: what an event costs, and what is noticed",
        _setup(variants, loop, load_before, command),
        *(_load_table(results, variants, clients) for clients in sorted({clients for clients, _ in results.loads})),
        _thread_table(results),
        _pingpong_table(results),
        _codec_table(results),
        _fault_table(results),
        _slow_table(results),
        _words(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def spread(values: Iterable[float], digits: int) -> str:
    given = list(values)
    return f"{statistics.median(given):.{digits}f} ({min(given):.{digits}f}–{max(given):.{digits}f})"


def _setup(variants: Sequence[Variant], loop: str, load_before: float, command: str) -> str:
    packages = ("msgspec", "grpcio", "pyzmq", "protobuf", "uvloop")
    left_out = [f"`{v.name}` ({', '.join(v.missing())} not installed)" for v in VARIANTS.values() if v.missing()]
    lines = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores",
        "load average over a minute": f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} at the end",
        "software": ", ".join([f"Python {platform.python_version()}", *map(_version, packages)]),
        "event loop": f"{loop}, in both processes",
        "commit": _commit(),
        "command": f"`{command}`",
        "a run": f"an open message with 40 prompt ids, {EVENTS - 1} blocks of 16 ids, the end; nothing is computed",
        "candidates": "; ".join(f"`{v.name}` ({v.what})" for v in variants),
        "left out": "; ".join(left_out) or "none",
        "spread": "median (smallest–largest) over rounds; all candidates take turns within a round",
    }
    return "\n".join(f"- **{name}**: {text}" for name, text in lines.items())


def _load_table(results: Results, variants: Sequence[Variant], clients: int) -> str:
    rows = []
    base = results.loads[clients, BASELINE]
    for variant in variants:
        rounds = results.loads[clients, variant.name]
        ratios = [one.runs_per_s / other.runs_per_s for one, other in zip(rounds, base, strict=True)]
        rows.append(
            [
                f"`{variant.name}`",
                spread((r.runs_per_s for r in rounds), 0),
                spread(ratios, 2),
                spread((r.first_ms(0.5) for r in rounds), 2),
                spread((r.first_ms(0.99) for r in rounds), 2),
                spread((r.cell_us for r in rounds), 1),
                spread((r.router_us for r in rounds), 1),
            ]
        )
    heads = "candidate | runs/s | × today | first event p50, ms | p99, ms | cell, µs of CPU an event | router, µs"
    note = {1: "\n\nEvery event is a frame of its own here: what a trickle of events costs."}.get(
        clients, "\n\nEvents of one turn of the loop share a frame, but for `streams-*` and `grpc-calls`."
    )
    return f"## {clients} client{'s' * (clients > 1)} on one connection{note}\n\n{_table(heads, rows)}"


def _thread_table(results: Results) -> str:
    if not results.threads:
        return ""
    nothing = [ticks for ticks, _ in results.threads[NOTHING]]
    rows = []
    for name, rounds in results.threads.items():
        ticks = [one for one, _ in rounds]
        arrivals = [one for _, one in rounds if one is not None]
        row = [
            name,
            spread((statistics.median(t.ticks_s) * 1e6 for t in ticks), 0),
            spread((longer_s(t, n) * 1e6 for t, n in zip(ticks, nothing, strict=True)), 0),
            spread((statistics.median(t.sends_s) * 1e6 for t in ticks), 0),
            spread((t.thread_cpu_s * 1e6 for t in ticks), 0),
            spread((t.process_cpu_s * 1e6 for t in ticks), 0),
        ]
        if arrivals:
            row += [
                spread((statistics.median(a.late_s) * 1e6 for a in arrivals), 0),
                spread((_share(a.late_s, 0.99) * 1e3 for a in arrivals), 1),
                spread((a.cpu_s * 1e6 for a in arrivals), 0),
            ]
        else:
            row += ["–"] * 3
        rows.append(row)
    heads = (
        "way | tick, µs | longer than without, µs | in the send, p50, µs | CPU of the engine's thread, µs "
        "| CPU of its process, µs | read after, p50, µs | p99, ms | reader's CPU, µs"
    )
    text = (
        "One event a tick from the engine's thread; an event loop in another process reads. A tick is work of about a "
        "millisecond, half of it with Python's lock held. All but the tick is an event's."
    )
    return f"## From an engine's thread\n\n{text}\n\n{_table(heads, rows)}"


def _pingpong_table(results: Results) -> str:
    if not results.pingpong:
        return ""
    rows = [
        [
            name,
            spread((_share(r.trips_s, 0.5) * 1e6 for r in rounds), 0),
            spread((_share(r.trips_s, 0.99) * 1e6 for r in rounds), 0),
            spread((r.cpu_s * 1e6 for r in rounds), 0),
        ]
        for name, rounds in results.pingpong.items()
    ]
    text = "A block's worth of ids there and back, each time from one engine's waiting thread to the other's."
    heads = "way | round trip p50, µs | p99, µs | CPU of one process a trip, µs"
    return f"## Between two engines' threads\n\n{text}\n\n{_table(heads, rows)}"


def _codec_table(results: Results) -> str:
    if not results.codecs:
        return ""
    rows = [
        [
            name,
            str(rounds[0].nbytes),
            spread((r.encode_s * 1e6 for r in rounds), 2),
            spread((r.decode_s * 1e6 for r in rounds), 2),
        ]
        for name, rounds in results.codecs.items()
    ]
    return f"## Codecs, one event of 16 ids\n\n{_table('codec | bytes | encode, µs | decode, µs', rows)}"


def _fault_table(results: Results) -> str:
    if not results.faults:
        return ""
    columns: list[Callable[[Faults], float | None]] = [
        lambda f: f.killed_s,
        lambda f: f.stopped_s,
        lambda f: f.hung_s,
        lambda f: f.router_stopped_s,
    ]
    rows = [
        [f"`{name}`", *(_noticed([column(one) for one in rounds]) for column in columns)]
        for name, rounds in results.faults.items()
    ]
    heads = "candidate | cell killed | cell stopped (SIGSTOP) | cell's loop hangs | router stopped, told to the cell"
    text = (
        f"Seconds until the other end's runs are told. Beats go each {BEAT_S:g} s, and {SILENCE_S:g} silent seconds "
        f"are the limit, in gRPC's and ZeroMQ's own terms too. “Never”: not within {LIMIT_S:g} s. A loop that hangs is "
        "one blocked callback; the process's other threads go on."
    )
    return f"## A death, a hang\n\n{text}\n\n{_table(heads, rows)}"


def _slow_table(results: Results) -> str:
    if not results.faults:
        return ""
    rows = [
        [
            f"`{name}`",
            _events(f.emitted_to_slow for f in rounds),
            spread((f.beside_slow_s * 1e3 for f in rounds), 1),
            rounds[0].slow_ending,
            _events(f.emitted_to_stopped for f in rounds),
        ]
        for name, rounds in results.faults.items()
    ]
    heads = (
        "candidate | events emitted for a run nobody reads | another run on that connection, ms | the unread run "
        "| events emitted to a stopped router"
    )
    text = (
        f"A cell emits up to {FLOOD:,} events of some 130 bytes as fast as it may. First the router does not take one "
        "run's events, but serves its connection; then the whole router is stopped. The bound of an inbox is "
        f"{BOUND} events, where we keep one."
    )
    return f"## A slow reader\n\n{text}\n\n{_table(heads, rows)}"


def _words(results: Results) -> str:
    if not results.faults:
        return ""
    lines = []
    for name, rounds in results.faults.items():
        told = "; ".join(f"{fault}: “{words}”" for fault, words in rounds[-1].words.items())
        lines.append(f"- `{name}`: {told}")
    return "In what words:\n" + "\n".join(lines)


def _noticed(seconds: Sequence[float | None]) -> str:
    known = [s for s in seconds if s is not None]
    if not known:
        return "never"
    digits = 3 if max(known) < 0.1 else 1
    missed = len(seconds) - len(known)
    return spread(known, digits) + (f", never in {missed} of {len(seconds)}" if missed else "")


def _events(counts: Iterable[int]) -> str:
    given = list(counts)
    middle = f"{statistics.median(given):,.0f} ({min(given):,}–{max(given):,})"
    return f"all {FLOOD:,}" if min(given) >= FLOOD else middle


def _share(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[int(share * (len(ordered) - 1))]


def _table(heads: str, rows: Sequence[Sequence[str]]) -> str:
    columns = heads.count("|") + 1
    return "\n".join([f"| {heads} |", "|" + "---|" * columns, *("| " + " | ".join(row) + " |" for row in rows)])


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    dirty = " with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + dirty


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
