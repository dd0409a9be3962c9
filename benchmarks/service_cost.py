"""What the service adds to an answer: the way from the client to the towers and back.

Starts a service of the demo (colocated, one cell, all on loopback). Asks it and a pair in this process the same
requests, in turns. Two questions:

  one block    one client, answers of a single block: what of its time is spent outside the engines' ticks
  short ar     16 clients, `ar` answers of one block: tokens per second, served ÷ in process

examples:
  python -m benchmarks.service_cost
  python -m benchmarks.service_cost --rounds 9 --output benchmarks/results/service_cost_<hardware>_<date>.md
"""

import argparse
import asyncio
import os
import shlex
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
from tqdm import tqdm

from benchmarks.chaos_parts.service import Service, Shape, running_service
from benchmarks.reference.driver import Measured, drive
from benchmarks.reference.paths import InProcessPath, Piece, Running, ServedPath
from benchmarks.reference.paths import Path as Way
from benchmarks.reference.report import bullets, setting, spread, table
from benchmarks.reference.service import free_ports
from benchmarks.reference.workload import DEMO, Workload
from twotower.commands.parser import count
from twotower.core import Mode, Request
from twotower.engine.settings import EngineSettings
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower

_BLOCK, _WARM, _CLIENTS = 16, 20, 16
_WAYS = ("in process", "gRPC", "HTTP")


class HttpPath:
    """`POST /v1/completions` with `stream`, of a service that is already up."""

    name = "HTTP"

    def __init__(self, address: str) -> None:
        self._address = address

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Running]:
        async with httpx.AsyncClient(base_url=f"http://{self._address}", timeout=120, trust_env=False) as http:
            yield _Http(http)


class _Http:
    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def generate(self, request: Request) -> AsyncIterator[Piece]:
        params = request.params
        body = {
            "prompt": list(request.prompt_token_ids),
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "ignore_eos": params.ignore_eos,
            "diffusion": {"mode": params.mode.value},
        }
        if params.mode is Mode.DIFFUSION:
            body["diffusion"] |= {"confidence_threshold": params.confidence_threshold}
        answer = await self._http.post("/v1/completions", json=body)
        [choice] = answer.raise_for_status().json()["choices"]
        yield Piece(tuple(choice["token_ids"]), 0)


@dataclass
class Found:
    """By way, a value a round. Seconds, and tokens per second."""

    one_block_s: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in _WAYS})
    outside_s: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in _WAYS})
    short_ar: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in _WAYS})

    def ratio(self, way: str) -> list[float]:
        """Tokens per second, divided by those of the pair in this process in the same round."""
        return [ours / base for ours, base in zip(self.short_ar[way], self.short_ar["in process"], strict=True)]


class Experiment:
    """Asks in turns: what the machine does meanwhile hits all ways alike."""

    def __init__(self, service: Service, rounds: int, requests: int) -> None:
        checkpoint, cpu = Checkpoint.open(DEMO), torch.device("cpu")
        context = load_context_tower(checkpoint, cpu, torch.float32)
        denoiser = load_denoiser_tower(checkpoint, cpu, torch.float32)
        settings = EngineSettings(max_sequences=32, max_queued_requests=64)
        self._service, self._rounds, self._requests = service, rounds, requests
        self._workload = Workload(checkpoint, _BLOCK, 0.8, ignore_eos=True)
        local = InProcessPath(context, denoiser, settings, threads=1)
        self._paths: dict[str, Way] = dict(
            zip(_WAYS, (local, ServedPath(service.grpc), HttpPath(service.http)), strict=True)
        )
        self.found = Found()

    async def run(self) -> Found:
        for number in tqdm(range(self._rounds), unit="round", smoothing=0):
            for way in _WAYS if number % 2 == 0 else _WAYS[::-1]:
                await self._one_block(way, number)
                measured = await self._ask(way, Mode.AR, _CLIENTS, 16 * _CLIENTS, f"{way}-ar-{number}")
                self.found.short_ar[way].append(measured.tokens_per_second)
        return self.found

    async def _one_block(self, way: str, number: int) -> None:
        before = await self._busy_s()
        measured = await self._ask(way, Mode.DIFFUSION, 1, self._requests, f"{way}-block-{number}")
        busy_s = (await self._busy_s() - before) / (self._requests + _WARM)
        each_s = [answer.arrivals[-1] for answer in measured.answers]
        self.found.one_block_s[way].append(statistics.median(each_s))
        if way != "in process":
            self.found.outside_s[way].append(statistics.mean(each_s) - busy_s)

    async def _ask(self, way: str, mode: Mode, clients: int, number: int, name: str) -> Measured:
        name = name.replace(" ", "-")
        warm_up = self._workload.requests(mode, _WARM, f"{name}-warm")
        return await drive(self._paths[way], warm_up, self._workload.requests(mode, number, name), clients)

    async def _busy_s(self) -> float:
        """What the service's engines have ticked. Both are on one thread, and say the same of it."""
        [cell] = await self._service.stats()
        return max(tower.busy_s for tower in cell.towers)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=count, default=5, help="each way once in each (%(default)s)")
    parser.add_argument("--requests", type=count, default=100, help="of one block in a round (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the report there")
    options = parser.parse_args(arguments)
    load_before = os.getloadavg()[0]
    with running_service(Shape("colocated", 1), {}, free_ports()) as service:
        found = asyncio.run(Experiment(service, options.rounds, options.requests).run())
    command = shlex.join(["python", "-m", "benchmarks.service_cost", *(arguments or sys.argv[1:])])
    report = _report(found, bullets(setting(load_before, command)))
    print(report)
    if options.output is not None:
        options.output.write_text(report, encoding="utf-8")
    return 0


def _report(found: Found, how: str) -> str:
    rows = [
        [
            way,
            _ms(found.one_block_s[way]),
            _ms(found.outside_s[way]) if found.outside_s[way] else "–",
            spread(found.short_ar[way], 0),
            spread(found.ratio(way), 2),
        ]
        for way in _WAYS
    ]
    head = ["way", "one block, ms", "outside the ticks, ms", "short ar, tokens/s", "÷ in process"]
    return f"""# What the service adds to an answer

{how}

- one block: from asking to the last token, median of a round; one client, {_BLOCK} tokens, γ 0.8, no EOS.
- outside the ticks: its mean, less what the engines ticked for each request by their own clock.
- short ar: {_CLIENTS} clients, answers of {_BLOCK} tokens, which come one by one.
- Each is the median over the rounds, smallest to largest in brackets. HTTP: whole answers; the others stream.

{table(head, rows)}
"""


def _ms(seconds: Sequence[float]) -> str:
    return spread([1e3 * value for value in seconds], 1)


if __name__ == "__main__":
    raise SystemExit(main())
