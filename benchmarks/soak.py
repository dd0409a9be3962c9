"""Whether a badly used service stays stable: memory, file descriptors, threads, slots over time.

Clients of `benchmarks.chaos` ask all the time, in all modes and over both faces. Other clients cancel, have too short a
deadline, read slowly, or vanish: their connection is reset while the answer streams. Every second each process of the
service is inspected. The report compares the second quarter of the time with the last one. Once all clients have left,
every slot and page must be free; otherwise the exit status is 1.

examples:
  python -m benchmarks.soak --minutes 30 --output benchmarks/results/soak_<hardware>_<date>.md
  python -m benchmarks.soak --minutes 1 --placement colocated
"""

import argparse
import asyncio
import json
import os
import random
import shlex
import socket
import statistics
import struct
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the towers of the demo are so small that threads only wait

import grpc
import httpx
import matplotlib
import psutil

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tqdm import tqdm

from benchmarks.chaos_parts.client import Asked, Client, Load, Part, Question, Unanswered, body_of, client_of, questions
from benchmarks.chaos_parts.service import Service, Shape, running_service
from benchmarks.reference.report import bullets, setting, table
from benchmarks.reference.service import free_ports
from twotower.commands.parser import count

_EVERY_S, _DRAIN_S, _IDLE_S = 1.0, 120.0, 20.0
_SHORT_S, _SLOW_S = 0.4, 0.3
_MEASURES = ("memory MiB", "file descriptors", "threads")
_FLAT = {"memory MiB": 1.05, "file descriptors": 1.1, "threads": 1.1}
Series = dict[str, dict[str, list[tuple[float, float]]]]  # by measure and process


class Rude:
    """Clients that do not read their answers to the end. `done` counts how each try ended."""

    def __init__(self, client: Client, service: Service, asked: Sequence[Question], seed: int) -> None:
        self._client, self._asked, self._random = client, [q for q in asked if q.is_stream], random.Random(seed)
        self._host, _, self._port = service.http.partition(":")
        self.done: Counter[str] = Counter()

    async def run(self, kind: str) -> None:
        """Again and again, until cancelled."""
        while True:
            question = self._random.choice([q for q in self._asked if kind != "vanishes" or q.face == "http"])
            asked = Asked(f"rude-{kind.split()[0]}-{self.done.total()}", question, time.monotonic())
            try:
                await getattr(self, f"_{kind.replace(' ', '_')}")(asked)
                ended = "as meant"
            except (grpc.aio.AioRpcError, httpx.HTTPError, Unanswered, OSError) as error:
                ended = error.code().name if isinstance(error, grpc.aio.AioRpcError) else str(error)[:60]
                if kind == "has no time" and ("DEADLINE" in ended or "not finished within" in ended):
                    ended = "as meant"
            self.done[f"{kind}: {ended}"] += 1
            await asyncio.sleep(self._random.random() * 0.2)

    def _parts(self, asked: Asked, timeout_s: float = 120.0) -> "aclosing[AsyncGenerator[Part, None]]":
        return aclosing(self._client.parts(asked, timeout_s))

    async def _cancels(self, asked: Asked) -> None:
        async with self._parts(asked) as parts:
            for _ in range(self._random.randint(0, 3)):
                await anext(parts)

    async def _has_no_time(self, asked: Asked) -> None:
        async with self._parts(asked, self._random.random() * _SHORT_S + 0.01) as parts:
            async for _ in parts:
                pass

    async def _reads_slowly(self, asked: Asked) -> None:
        async with self._parts(asked) as parts:
            async for _ in parts:
                await asyncio.sleep(self._random.random() * _SLOW_S)

    async def _vanishes(self, asked: Asked) -> None:
        """Without a word: the connection is reset, before, while or after it is answered."""
        reader, writer = await asyncio.open_connection(self._host, int(self._port))
        try:
            body = json.dumps(body_of(asked)).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body[: self._random.choice((len(body) // 2, len(body), len(body)))])
            await writer.drain()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._random.random()):
                    await reader.read(self._random.choice((1, 400)))
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        finally:
            writer.transport.abort()


KINDS = ("cancels", "has no time", "reads slowly", "vanishes")


async def _soak(
    service: Service, asked: list[Question], options: argparse.Namespace
) -> tuple[Series, Load, Counter[str], list[str]]:
    series: Series = defaultdict(lambda: defaultdict(list))
    async with client_of(service.http, service.grpc) as client:
        rude = Rude(client, service, asked, options.seed)
        load = Load(lambda one: client.ask(one, lambda heard: None), asked, "soak")
        load.start(options.clients)
        tasks = [asyncio.create_task(rude.run(kind)) for kind in KINDS for _ in range(options.rude)]
        try:
            await _watch(service, load, series, 60 * options.minutes)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            await load.stop(_DRAIN_S)
    _, wrong = await service.until_right(_IDLE_S, idle=True)
    wrong += [f"a client of ours: {error!r}" for error in ended if isinstance(error, Exception)]
    return series, load, rude.done, wrong


async def _watch(service: Service, load: Load, series: Series, seconds: float) -> None:
    began = time.monotonic()
    processes = _named(service)
    with tqdm(total=round(seconds), unit="s") as bar:
        while (now := time.monotonic() - began) < seconds:
            for name, process in processes.items():
                with suppress(psutil.Error):
                    values = (process.memory_info().rss / 2**20, process.num_fds(), process.num_threads())
                    for measure, value in zip(_MEASURES, values, strict=True):
                        series[measure][name].append((now, value))
            with suppress(Exception):  # Ray's and Serve's own, of many kinds
                census = await service.census()
                series["held"]["requests in cells"].append((now, census.held))
            series["held"]["requests asked by patient clients"].append((now, len(load.in_flight)))
            bar.set_postfix_str(f"{len(load.asked)} requests")
            bar.update(round(now) - bar.n)
            await asyncio.sleep(_EVERY_S)


def _named(service: Service) -> dict[str, psutil.Process]:
    found = service.processes()
    return {
        f"{kind} {index}" if len(some) > 1 else kind: process
        for kind, some in found.items()
        for index, process in enumerate(some)
    }


def grown(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Medians of the second quarter and of the last."""
    quarter = max(1, len(points) // 4)
    early, late = points[quarter : 2 * quarter] or points, points[-quarter:]
    return statistics.median(value for _, value in early), statistics.median(value for _, value in late)


def _render(series: Series, load: Load, rude: Counter[str], wrong: list[str], where: dict[str, str]) -> str:
    outcomes = Counter(asked.outcome.split(":")[0] for asked in load.asked)
    told = ", ".join(f"{number} {name}" for name, number in outcomes.most_common())
    names = list(series[_MEASURES[0]])
    rows, not_flat = [], []
    for name in names:
        row = [name]
        for measure in _MEASURES:
            before, after = grown(series[measure][name])
            row.append(f"{before:.0f} → {after:.0f}")
            if after > before * _FLAT[measure] + 1:
                not_flat.append(f"{measure} of {name}: {before:.0f} → {after:.0f}")
        rows.append(row)
    bad = [*not_flat, *wrong, *(a.outcome for a in load.asked if a.outcome.startswith(("failed", "changed")))]
    parts = [
        "# A service that is used badly, for a while",
        bullets(where),
        f"**{len(load.asked)} requests of patient clients: {told}. "
        + (f"{len(not_flat)} series are not flat.**" if not_flat else "All series are flat.**"),
        "Medians of the second quarter of the time → of the last. Flat: memory grows by no more than 5 %, file "
        "descriptors and threads by 10 %, and one.",
        table(["process", *_MEASURES], rows),
        "## How impatient clients ended\n\n" + table(["", "times"], [[k, str(n)] for k, n in sorted(rude.items())]),
        "## What went wrong\n\n" + ("\n".join(f"- {text}" for text in bad) or "Nothing."),
    ]
    return "\n\n".join(parts) + "\n"


def _plot(series: Series, path: Path) -> None:
    figure, axes = plt.subplots(len(series), 1, figsize=(9, 2.3 * len(series)), sharex=True, layout="constrained")
    for axis, (measure, processes) in zip(axes, series.items(), strict=True):
        for name, points in processes.items():
            axis.plot([at / 60 for at, _ in points], [value for _, value in points], lw=1, label=name)
        axis.set_ylabel(measure)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=6, ncols=5, loc="lower right")
    axes[-1].set_xlabel("minutes")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    load_before = os.getloadavg()[0]
    asked = asyncio.run(questions(options.questions, options.max_new_tokens, options.seed))
    shape = Shape(options.placement, options.cells)
    with running_service(shape, {}, free_ports()) as service:
        series, load, rude, wrong = asyncio.run(_soak(service, asked, options))
    command = shlex.join(["python", "-m", "benchmarks.soak", *(sys.argv[1:] if arguments is None else arguments)])
    where = setting(load_before, command) | {
        "service": f"demo, {shape.placement}, cells: {shape.cells}",
        "load": f"{options.clients} patient clients, {options.rude} of each impatient kind",
        "time": f"{options.minutes:g} minutes",
    }
    report = _render(series, load, rude, wrong, where)
    if options.output is None:
        print(report)
    else:
        picture = options.output.with_suffix(".png")
        _plot(series, picture)
        options.output.write_text(f"{report}\n![series]({picture.name})\n", encoding="utf-8")
        print(f"written to {options.output} and {picture}")
    return int(not report.endswith("Nothing.\n"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=30.0, help="of load (%(default)s)")
    add("--placement", choices=("split", "colocated"), default="split", help="of each cell (%(default)s)")
    add("--cells", type=int, choices=(1, 2), default=2, help="two are on two nodes (%(default)s)")
    add("--clients", type=count, default=8, help="patient ones, in closed loops (%(default)s)")
    add("--rude", type=count, default=2, help="clients of each impatient kind (%(default)s)")
    add("--questions", type=count, default=16, help="that are asked in turn (%(default)s)")
    add("--max-new-tokens", type=count, default=96, help="of an answer (%(default)s)")
    add("--seed", type=int, default=0, help="of prompts and tempers (%(default)s)")
    add("--output", type=Path, metavar="FILE.md", help="write the report there, and a picture beside it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
