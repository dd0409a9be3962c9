"""A cluster of this service, simulated: clients, routers, cells, Serve's controller, faults and drains.

The routers are the product's own: admission, turns, runs, lines to cells, Serve's request router with our ranks, the
policy of scaling. They run on a clock that jumps to the next event. A cell is the product's ledger and scheduler over
passes that only take time: the planner's, or measured ones. `diffusion` alone is simulated.

examples:
  python -m benchmarks.simulate                                                 ten cells of H200, a look at everything
  python -m benchmarks.simulate --cells 1000 --rate 50000 --routers 12 --output benchmarks/results/simulation_<date>
  python -m benchmarks.simulate --only steady --routers 4,8,12 --cells 100 --rate 5000
  python -m benchmarks.simulate --validate grpc://127.0.0.1:50051 --output validation
      against a service of the demo on this machine: `twotower bench`'s load, and the model beside it
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from twotower.commands.parser import count
from twotower.errors import TwoTowerError

EVENT_S, REQUEST_S = 0.00017, 0.0056


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    command = shlex.join(["python", "-m", "benchmarks.simulate", *given])
    try:
        text, draw = (_validated if options.validate else _simulated)(options, command)
    except TwoTowerError as error:
        print(f"benchmarks.simulate: {error}", file=sys.stderr)
        return 2
    print(text)
    if options.output is not None:
        options.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        draw(options.output.with_suffix(".png"))
    return 0


def _simulated(options: argparse.Namespace, command: str) -> tuple[str, Callable[[Path], None]]:
    from benchmarks.simulate_parts.plot import plot
    from benchmarks.simulate_parts.report import render
    from benchmarks.simulate_parts.scenarios import Scale, run, scenarios

    scale = Scale(
        options.cells, options.rate / 60, options.seconds, options.device, options.context, options.lengths,
        options.denoisers, options.tokens_per_step, options.start, options.request_ms / 1e3, options.event_ms / 1e3,
        tuple(options.set), options.seed,
    )  # fmt: skip
    chosen = [one for one in scenarios(scale) if not options.only or one.name in options.only]
    found = []
    for one in chosen:
        for routers in options.routers:
            total = one.requests(scale)
            with tqdm(total=total, desc=f"{one.name}, {routers} routers", unit=" requests", file=sys.stderr) as bar:
                found.append(run(one, scale, routers, lambda outcome, bar=bar: bar.update()))
    picture = f"{options.output.name}.png" if options.output is not None else None
    return render(scale, found, command, os.getloadavg()[0], picture), lambda path: plot(found, path)


def _validated(options: argparse.Namespace, command: str) -> tuple[str, Callable[[Path], None]]:
    from benchmarks.simulate_parts.validation import validate

    found = validate(options.validate, options.clients, options.requests, options.seed, options.set)
    return found.text(command), found.plot


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("cluster").add_argument
    add("--cells", type=count, default=10, metavar="N", help="at the beginning, or as many as there are at most (10)")
    add("--routers", type=_counts, default=(2,), metavar="N,M", help="each number in turn (2)")
    add("--set", action="append", default=[], metavar="section.name=value", help="a setting of the service")
    add("--device", default="h200", help="the planner's (h200)")
    add("--denoisers", type=int, default=0, metavar="N", help="a context tower; 0: both towers on one device (0)")
    add("--context", type=count, default=2048, metavar="TOKENS", help="behind each row, for what passes cost (2048)")
    add("--start", type=_seconds, default=90.0, metavar="S", help="how long a cell takes to start (90)")
    told = "of a router's interpreter for a request (%(default)g)"
    add("--request-ms", type=_seconds, default=1e3 * REQUEST_S, metavar="MS", help=told)
    add("--event-ms", type=_seconds, default=1e3 * EVENT_S, metavar="MS", help="and for each event (%(default)g)")
    add = parser.add_argument_group("load").add_argument
    add("--rate", type=_seconds, default=500.0, metavar="N", help="requests a minute (500)")
    add("--seconds", type=_seconds, default=120.0, metavar="S", help="of arrivals in each scenario (120)")
    add("--lengths", default="conversation", help="whose prompts and answers: conversation or code (conversation)")
    add("--tokens-per-step", type=_seconds, default=2.85, metavar="N", help="of diffusion (2.85)")
    add("--seed", type=int, default=1, help="of all that is drawn (1)")
    add("--only", type=lambda text: text.split(","), default=[], metavar="A,B", help="of the scenarios, these")
    add = parser.add_argument_group("validation").add_argument
    add("--validate", metavar="URL", help="against this service of the demo, which runs on this machine")
    add("--clients", type=_counts, default=(1, 4, 16, 64), metavar="N,M", help="of the load (1,4,16,64)")
    add("--requests", type=count, default=400, metavar="N", help="of each number of clients (400)")
    parser.add_argument("--output", type=Path, metavar="PREFIX", help="write PREFIX.md and PREFIX.png too")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(count(word) for word in text.split(",")))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
