"""What a service under load survives: processes are killed and hung at every moment of a request's life.

Starts a service of the demo on its own Ray with a second node (all on this machine, on loopback). Clients ask over both
faces in all modes. Faults hit the context tower, the denoiser, a cell's replica, Serve's controller, and the second
node's raylet. Every answer is compared with the library's own, computed before in this process. After each fault the
service must become whole, and once idle nothing may be left over. Exit status 1 if anything is wrong.

examples:
  python -m benchmarks.chaos --output benchmarks/results/chaos_<hardware>_<date>.md      every kind in every phase
  python -m benchmarks.chaos --quick                                                     two faults
  python -m benchmarks.chaos --cells 1 --kinds denoiser,context                          what a single cell does
  python -m benchmarks.chaos --kinds router,proxy                                        clients ask again
"""

import argparse
import asyncio
import os
import random
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the towers of the demo are so small that threads only wait

import yaml
from tqdm import tqdm

from benchmarks.chaos_parts.client import Question, client_of, questions
from benchmarks.chaos_parts.faults import HUNG, PHASES, Fault, Round, one_round
from benchmarks.chaos_parts.report import plot, render
from benchmarks.chaos_parts.service import Service, Shape, running_service
from benchmarks.reference.report import setting
from benchmarks.reference.service import free_ports
from twotower.commands.parser import count

_QUICK = (Fault("denoiser", "step"), Fault("cell", "commit"))
_AGAIN = ("router", "proxy")


def kinds_of(shape: Shape) -> tuple[str, ...]:
    """What there is to strike, but for routers and proxies, which end what they hold."""
    towers = ("context", "denoiser") if shape.placement == "split" else ("tower",)
    roles = [*towers, "cell", "controller", *(["raylet"] if shape.cells > 1 else [])]
    return (*roles, *(role + HUNG for role in roles))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    shape = Shape(options.placement, options.cells)
    faults = list(_QUICK) if options.quick else _faults(options, shape)
    load_before, began = os.getloadavg()[0], time.monotonic()
    asked = asyncio.run(questions(options.questions, options.max_new_tokens, options.seed))
    rounds: list[Round] = []
    with running_service(shape, _settings(options.set), free_ports()) as service:
        command = shlex.join(["python", "-m", "benchmarks.chaos", *(sys.argv[1:] if arguments is None else arguments)])
        try:
            asyncio.run(_strike(service, asked, faults, options, rounds))
        finally:
            if rounds:
                where = setting(load_before, command) | _what(options, shape, len(asked), time.monotonic() - began)
                _write(rounds, where, options.output)
    return int(any(done.wrong or done.outcomes("failed") or done.outcomes("changed") for done in rounds))


async def _strike(
    service: Service, asked: list[Question], faults: list[Fault], options: argparse.Namespace, rounds: list[Round]
) -> None:
    end = time.monotonic() + 60 * options.minutes
    async with client_of(service.http, service.grpc) as client:
        for fault in (bar := tqdm(faults, desc="faults")):
            if time.monotonic() > end:
                tqdm.write(f"{len(faults) - len(rounds)} faults are left out: {options.minutes:g} minutes are over")
                return
            bar.set_postfix_str(str(fault))
            rounds.append(done := await one_round(service, client, asked, fault, options.clients))
            tqdm.write(_line(done))


def _line(done: Round) -> str:
    bad = [*done.wrong, *{asked.outcome for name in ("failed", "changed") for asked in done.outcomes(name)}]
    worst = f"{max(done.stalls):.1f}" if done.stalls else "–"
    told = (
        f"{len(done.asked)} requests, {done.resumed} resumed, worst stall {worst} s, whole after {done.whole_s:.1f} s"
    )
    return f"{done.fault}: {told}" + "".join(f"\n    {text[:300]}" for text in bad)


def _write(rounds: list[Round], where: dict[str, str], output: Path | None) -> None:
    picture = None if output is None else output.with_suffix(".png")
    report = render("What a service under load survives", rounds, where, picture)
    if output is None or picture is None:
        print(report)
        return
    plot(rounds, picture)
    output.write_text(report, encoding="utf-8")
    print(f"written to {output} and {picture}")


def _what(options: argparse.Namespace, shape: Shape, asked: int, seconds: float) -> dict[str, str]:
    return {
        "service": f"demo, {shape.placement}, cells: {shape.cells}, the last on a second node where there are two; "
        + (", ".join(options.set) or "all settings the defaults"),
        "load": f"{options.clients} clients in closed loops, {asked} questions of {options.max_new_tokens} new tokens: "
        "diffusion, mock_ar, ar, scores; gRPC and HTTP; streams and whole answers; stop strings",
        "took": f"{seconds / 60:.1f} minutes",
    }


def _faults(options: argparse.Namespace, shape: Shape) -> list[Fault]:
    kinds = options.kinds or kinds_of(shape)
    known = {*kinds_of(shape), *_AGAIN, *(role + HUNG for role in _AGAIN)}
    if unknown := set(kinds) - known:
        raise SystemExit(f"--kinds: got {', '.join(sorted(unknown))}, wanted some of {', '.join(sorted(known))}")
    faults: list[Fault] = [Fault(kind, phase) for kind in kinds for phase in options.phases] * options.repeats
    random.Random(options.seed).shuffle(faults)
    return faults


def _settings(given: Sequence[str]) -> dict[str, dict[str, object]]:
    settings: dict[str, dict[str, object]] = {}
    for one in given:
        path, _, value = one.partition("=")
        section, _, name = path.partition(".")
        settings.setdefault(section, {})[name] = yaml.safe_load(value)
    return settings


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _phases(text: str) -> tuple[str, ...]:
    if unknown := set(_words(text)) - set(PHASES):
        raise argparse.ArgumentTypeError(f"got {', '.join(sorted(unknown))}, wanted some of {', '.join(PHASES)}")
    return _words(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--placement", choices=("split", "colocated"), default="split", help="of each cell (%(default)s)")
    add("--cells", type=int, choices=(1, 2), default=2, help="two are on two nodes (%(default)s)")
    add("--kinds", type=_words, metavar="A,B", help='what is struck, such as "context,cell hung" (all of the service)')
    add("--phases", type=_phases, default=PHASES, metavar="A,B", help=f"of {','.join(PHASES)} (all)")
    add("--repeats", type=count, default=1, help="of each kind in each phase (%(default)s)")
    add("--clients", type=count, default=16, help="at once (%(default)s)")
    add("--questions", type=count, default=16, help="that are asked in turn (%(default)s)")
    add("--max-new-tokens", type=count, default=96, help="of an answer (%(default)s)")
    add("--minutes", type=float, default=60.0, help="no fault begins after so many (%(default)s)")
    add("--seed", type=int, default=0, help="of prompts, and of the order of faults (%(default)s)")
    add("--set", action="append", default=[], metavar="A.B=C", help="a setting of the service; may be repeated")
    add("--quick", action="store_true", help=f"{' and '.join(map(str, _QUICK))} only")
    add("--output", type=Path, metavar="FILE.md", help="write the report there, and a picture beside it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
