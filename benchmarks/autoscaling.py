"""What a burst, a valley and ten times too much do to a service of the demo: cells, queue, latency, refusals.

Starts the service twice, on free ports. First with 1 to 3 cells: a valley, a burst, a valley. Then with one cell: idle,
full, ten times as many arrivals as it answers, idle again. Writes PREFIX.md and PREFIX.png; takes about five minutes.

examples:
  python -m benchmarks.autoscaling --output benchmarks/results/autoscaling_<hardware>_<date>
  python -m benchmarks.autoscaling --seconds 10 --output /tmp/look                          a first look
"""

import argparse
import asyncio
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil

from benchmarks.autoscaling_parts.load import Load, answered, between
from benchmarks.autoscaling_parts.report import Overload, Wave, overload_text, plot, wave_text
from benchmarks.reference.report import setup
from benchmarks.reference.service import started
from benchmarks.reference.workload import DEMO, Workload
from cluster.ops.run_state import running
from twotower.commands.parser import count
from twotower.core import Mode
from twotower.model.checkpoint import Checkpoint
from twotower_client.asking import Params

SLOTS, MOST_CELLS = 4, 3
CLIENTS = (1, 20, 1)  # in the first valley, the burst, the second valley
TOKENS = 128
_CELL = ["cell.placement=colocated", "cell.device=cpu", f"cell.max_sequences={SLOTS}", "decode.mode=diffusion"]
_WAVE = [f"cluster.max_cells={MOST_CELLS}", "cluster.max_queued_requests=16", "cluster.downscale_delay_s=10"]
_ONE = [f"cluster.max_queued_requests={SLOTS}"]
_WATCH_S = 0.5
_WHAT = f"""\
- Every request is the same: a prompt of the demo's, {TOKENS} tokens, EOS ignored, diffusion at γ 0.8, a gRPC
  stream. All clients share the machine with the service, and have one address.
- A cell has {SLOTS} slots. Cells are counted as `up` tells them, every two seconds: their times are up to two seconds
  too long.
- Cells of this run share the same cores, so that more of them have no more throughput. What is shown is when they come
  and go, and that nothing breaks.
- Times are upper bounds where the load average says that the machine was shared."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    load_before = os.getloadavg()[0]
    command = shlex.join(
        ["python", "-m", "benchmarks.autoscaling", *(sys.argv[1:] if arguments is None else arguments)]
    )
    wave = asyncio.run(_wave(options.seconds))
    plot(wave, options.output.with_suffix(".png"))
    told = _wave_parts(wave, options.output.with_suffix(".png").name)
    _write(options.output, load_before, command, told)  # whatever becomes of the second part
    told += _overload_parts(asyncio.run(_overload(options.seconds)))
    _write(options.output, load_before, command, told)
    return 0


def _write(output: Path, load_before: float, command: str, told: list[str]) -> None:
    parts = ["# Cells under a burst and a valley, and ten times too much", setup(load_before, command), _WHAT, *told]
    output.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _wave_parts(wave: Wave, picture: str) -> list[str]:
    settings = f"Settings: `{' '.join([*_CELL, *_WAVE])}`, the others by default."
    shown = f"![Cells, requests and latency over time]({picture})"
    return [f"## A burst and a valley\n\n{settings}", wave_text(wave, CLIENTS, MOST_CELLS), shown]


def _overload_parts(overload: Overload) -> list[str]:
    settings = f"Settings: `{' '.join([*_CELL, *_ONE])}`. Full: as many clients as there are places."
    return [f"## Ten times too much\n\n{settings}", overload_text(overload)]


def _workload() -> Workload:
    return Workload(Checkpoint.open(DEMO), TOKENS, 0.8, ignore_eos=True)


def _load(address: str) -> Load:
    [one] = _workload().requests(Mode.DIFFUSION, 1, "load")
    return Load(address, one.prompt_token_ids, Params(mode="diffusion", max_new_tokens=TOKENS, ignore_eos=True))


async def _wave(seconds: int) -> Wave:
    [first] = _workload().requests(Mode.DIFFUSION, 1, "first")
    async with started([*_CELL, *_WAVE], first) as service:
        load = _load(service.address)
        wave = Wave([load.now()], load.asked)
        watching = asyncio.create_task(_watch(service.address, load, wave))
        ends_with = (1, MOST_CELLS, 1)  # cells: a phase lasts until there are so many
        for clients, length, cells in zip(CLIENTS, (seconds / 2, seconds * 2, seconds * 2), ends_with, strict=True):
            await load.clients(clients, length, lambda cells=cells: not wave.cells or wave.cells[-1][1] != cells)
            wave.marks.append(load.now())
            print(f"{wave.marks[-1]:6.1f} s: {clients} clients have asked, {wave.cells[-1][1]} cells", flush=True)
        watching.cancel()
        await load.close()
        return wave


async def _watch(address: str, load: Load, wave: Wave) -> None:
    """How many cells `up` tells of, and how many it has started."""
    while True:
        [state] = [state for state in running().values() if state.grpc == address]
        if state.cells:  # it is ready, and has said so
            wave.cells.append((load.now(), state.cells))
        wave.started.append((load.now(), await asyncio.to_thread(_replicas, state.pid)))
        await asyncio.sleep(_WATCH_S)


def _replicas(pid: int) -> int:
    """Processes of cells, by their titles, below this one."""
    found = 0
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            title = " ".join(process.cmdline())
            found += title.startswith("ray::") and any(mark in title for mark in ("twotower#Cell#", ":twotower:Cell"))
    return found


async def _overload(seconds: int) -> Overload:
    [first] = _workload().requests(Mode.DIFFUSION, 1, "first")
    places = SLOTS + SLOTS
    async with started([*_CELL, *_ONE], first) as service:
        load = _load(service.address)
        marks = [load.now()]
        await load.clients(1, seconds / 3)
        marks.append(load.now())
        await load.clients(places, seconds)
        marks.append(load.now())
        per_second = 10 * len(answered(between(load.asked, *marks[1:]))) / (marks[2] - marks[1])
        print(f"overload: {per_second:.1f} requests/s", flush=True)
        await load.arrivals(per_second, seconds)
        marks.append(load.now())
        await load.clients(1, seconds / 3)
        marks.append(load.now())
        await load.close()
        idle, full, flood, after = (between(load.asked, began, ended) for began, ended in pairwise(marks))
        return Overload(idle, full, flood, after, per_second, places, SLOTS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autoscaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="of the files that are written")
    parser.add_argument("--seconds", type=count, default=30, metavar="N", help="of a phase, about (default: 30)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
