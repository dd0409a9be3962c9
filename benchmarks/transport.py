"""Which transport for our connections: what an event costs, and what a death, a hang and a slow reader look like.

    python -m benchmarks.transport --output benchmarks/results/transport_<hardware>_<date>.md   # fifteen minutes
    python -m benchmarks.transport --quick                                                      # a first look, three
    python -m benchmarks.transport --sections load --variants streams-json,framed --clients 16  # a part of it

Two processes, a cell that answers runs and a router that asks, over ONE connection. Nothing is computed. Each round
runs all candidates one after the other, so compare them by their ratios within rounds.

  load      clients in closed loops: runs a second, time to the first event, CPU of either side an event
  threads   a tower's case: events leave from the engine's own thread; how much longer its ticks become
  pingpong  the towers' case: two engines' threads that answer each other
  codecs    bytes and microseconds of one event
  faults    SIGKILL, SIGSTOP, a hung loop, a reader that does not read: what is noticed, and after how long

The candidates are one file each in benchmarks/transport_parts/ (streams, framed, grpc_channel, zmq_sockets) behind one
seam; `variants.py` lists them. The project does not need all that they need: `pip install msgspec pyzmq grpcio uvloop
protobuf` into an environment of your own, with the checkout on PYTHONPATH. Torch is not needed. A candidate whose
package is missing is left out, and the report says so.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.transport_parts import pingpong
from benchmarks.transport_parts.certificate import self_signed
from benchmarks.transport_parts.codecs import costs
from benchmarks.transport_parts.faults import provoke
from benchmarks.transport_parts.report import Results, Round, render
from benchmarks.transport_parts.seam import Secrets
from benchmarks.transport_parts.sides import both
from benchmarks.transport_parts.threads import WAYS, measure
from benchmarks.transport_parts.variants import BASELINE, VARIANTS, Variant

SECTIONS = ("load", "threads", "pingpong", "codecs", "faults")


@dataclass(frozen=True, slots=True)
class Plan:
    sections: tuple[str, ...]
    variants: tuple[Variant, ...]
    clients: tuple[int, ...]
    rounds: int
    seconds: float
    ticks: int
    loop: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit status 2 on bad arguments."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    plan = _plan(options)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        secrets = self_signed(Path(folder)) if any(v.encrypted for v in plan.variants) else None
        results = run(plan, secrets)
    report = render(
        results, plan.variants, plan.loop, load_before, shlex.join(["python", "-m", "benchmarks.transport", *given])
    )
    if options.output is None:
        print(report)
    else:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report, encoding="utf-8")
        print(f"written to {options.output}")
    return 0


def run(plan: Plan, secrets: Secrets | None) -> Results:
    results = Results()
    for number in range(plan.rounds):
        variants = plan.variants if number % 2 == 0 else plan.variants[::-1]
        for variant in variants:
            certificate = secrets if variant.encrypted else None
            if "load" in plan.sections:
                _say(number, plan, f"load, {variant.name}")
                _load(plan, variant, certificate, results)
            if "faults" in plan.sections:
                _say(number, plan, f"faults, {variant.name}")
                results.faults.setdefault(variant.name, []).append(provoke(variant.name, plan.loop, certificate))
        if "threads" in plan.sections:
            names = {v.name for v in plan.variants}
            for name in [name for name, way in WAYS.items() if way.variant in names]:
                _say(number, plan, f"threads, {name}")
                results.threads.setdefault(name, []).append(measure(name, plan.loop, plan.ticks))
        if "pingpong" in plan.sections:
            for name in [name for name, (msgspec, _) in pingpong.WAYS.items() if find_spec("msgspec") or not msgspec]:
                _say(number, plan, f"pingpong, {name}")
                results.pingpong.setdefault(name, []).append(pingpong.measure(name, plan.loop, plan.ticks))
        if "codecs" in plan.sections:
            for name, cost in costs(10 * plan.ticks).items():
                results.codecs.setdefault(name, []).append(cost)
    results.faults = {v.name: results.faults[v.name] for v in plan.variants if v.name in results.faults}
    return results


def _load(plan: Plan, variant: Variant, secrets: Secrets | None, results: Results) -> None:
    with both(variant.name, plan.loop, secrets) as (cell, router):
        for clients in plan.clients:
            router.call("load", clients, plan.seconds / 5)
            before = cell.call("cpu")
            load = router.call("load", clients, plan.seconds)
            done = Round(load, cell.call("cpu") - before)
            results.loads.setdefault((clients, variant.name), []).append(done)


def _say(number: int, plan: Plan, what: str) -> None:
    print(f"[round {number + 1} of {plan.rounds}] {what}", file=sys.stderr, flush=True)


def _plan(options: argparse.Namespace) -> Plan:
    quick = options.quick
    present = [v for v in options.variants if not v.missing()]
    for variant in options.variants:
        if variant not in present:
            print(f"left out: {variant.name} (install {', '.join(variant.missing())})", file=sys.stderr)
    return Plan(
        options.sections,
        tuple(present),
        options.clients,
        options.rounds or (1 if quick else 3),
        options.seconds or (0.5 if quick else 2.0),
        500 if quick else 3000,
        options.loop,
    )


def _variants(text: str) -> tuple[Variant, ...]:
    names = text.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, wanted some of {', '.join(VARIANTS)}")
    return tuple(variant for name, variant in VARIANTS.items() if name in (*names, BASELINE))


def _sections(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(SECTIONS):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted some of {','.join(SECTIONS)}")
    return names


def _clients(text: str) -> tuple[int, ...]:
    counts = text.split(",")
    if not all(count.isdecimal() and 1 <= int(count) <= 1024 for count in counts):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted counts from 1 to 1024 such as 1,16,64")
    return tuple(map(int, counts))


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number above 0 and up to 600")
    return value


def _rounds(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a count from 1 to 100")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transport", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = tuple(VARIANTS.values())
    parser.add_argument("--quick", action="store_true", help="one short round; a first look, no result")
    parser.add_argument("--sections", type=_sections, default=SECTIONS, help=f"of {','.join(SECTIONS)} (default: all)")
    parser.add_argument(
        "--variants", type=_variants, default=every, help=f"beside {BASELINE}, of {', '.join(VARIANTS)} (default: all)"
    )
    parser.add_argument("--clients", type=_clients, default=(1, 16, 64), help="on the connection (default: 1,16,64)")
    parser.add_argument("--rounds", type=_rounds, help="default: 3, quick 1")
    parser.add_argument("--seconds", type=_positive, help="a load (default: 2, quick 0.5)")
    loops = ["uvloop", "asyncio"]
    parser.add_argument(
        "--loop",
        choices=loops,
        default=loops[0] if find_spec("uvloop") else loops[1],
        help="event loop of both processes (default: uvloop where installed, as Ray's actors have it)",
    )
    parser.add_argument("--output", type=Path, help="a markdown file (default: printed)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
