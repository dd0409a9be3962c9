"""What the engines alone spend on a request: CPU time of a pair in this process, without a service around it."""

import asyncio
import time

import torch

from benchmarks.reference.paths import InProcessPath, Running
from benchmarks.reference.workload import DEMO, Workload
from twotower.core import Mode, Request
from twotower.engine.settings import EngineSettings
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower


class Engines:
    """The demo's towers on one thread."""

    def __init__(self, tokens: int) -> None:
        checkpoint, cpu = Checkpoint.open(DEMO), torch.device("cpu")
        towers = (
            load_context_tower(checkpoint, cpu, torch.float32),
            load_denoiser_tower(checkpoint, cpu, torch.float32),
        )
        self._path = InProcessPath(*towers, EngineSettings(max_sequences=32, max_queued_requests=64), threads=1)
        self._workload = Workload(checkpoint, tokens, 0.8, ignore_eos=True)

    async def costs_ms(self, mode: Mode, at_once: int, times: int) -> list[float]:
        """Milliseconds of a request, so many of them together; each time the same ones."""
        found = []
        async with self._path.open() as running:
            for number in range(times + 1):
                requests = self._workload.requests(mode, at_once, f"{mode}-{number}")
                began = time.process_time()
                await asyncio.gather(*(_read(running, request) for request in requests))
                found.append(1e3 * (time.process_time() - began) / at_once)
        return found[1:]  # the first has warmed it up


async def _read(running: Running, request: Request) -> None:
    async for _ in running.generate(request):
        pass
