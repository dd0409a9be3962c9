"""Measures README's table anew: quality and pace of every mode through a service that this command starts, then the
service against a naive loop.

examples:
  make bench                                  all of it: some two hours on two idle cores, into build/bench
  python -m benchmarks --quick                a first look in minutes; its figures say little
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import quality, reference_loop
from benchmarks.reference.service import started
from benchmarks.reference.workload import DEMO, Workload
from twotower.core import Mode
from twotower.model.checkpoint import Checkpoint

_PLACEMENT = "cell.placement=colocated"  # what two cores are served best by


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status of what failed."""
    options = _parser().parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    quick = ["--quick"] if options.quick else []
    whole = quick or ["--concurrency", "1,4,16,64"]
    status = asyncio.run(_through_a_service(["--overwrite", "--output", str(options.output / "quality"), *whole]))
    if status:
        return status
    report = str(options.output / "reference_loop.md")
    return reference_loop.main(["--set", _PLACEMENT, "--output", report, *(quick or ["--repeats", "2"])])


async def _through_a_service(flags: Sequence[str]) -> int:
    [first] = Workload(Checkpoint.open(DEMO), 16, 0.8, ignore_eos=False).requests(Mode.AR, 1, "first")
    print("starting a service of the demo", file=sys.stderr)
    async with started([_PLACEMENT], first) as service:
        return await asyncio.to_thread(quality.main, ["--target", f"grpc://{service.address}", *flags])


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="few requests, one round")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), metavar="DIR", help="(%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
