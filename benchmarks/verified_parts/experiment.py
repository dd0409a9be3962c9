"""The same held-out prompts in three modes, in process and through gRPC; what each costs in passes; bare passes."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm

from benchmarks.reference.driver import Measured, drive
from benchmarks.reference.paths import InProcessPath, Path, Running, ServedPath
from benchmarks.reference.workload import Workload
from benchmarks.verified_parts.bare import AR, COMMIT, PROMPT, STEP, VERIFY, Bare, Seconds
from twotower.core import COSTS, Mode, Request
from twotower.engine.in_process import pair_of
from twotower.engine.settings import EngineSettings
from twotower.model.tower import ContextTower, DenoiserTower

MODES = (Mode.AR, Mode.DIFFUSION, Mode.VERIFIED)
IN_PROCESS, SERVED = "in process", "gRPC"
_WARM_UP = 8


@dataclass(frozen=True)
class Plan:
    """`address`: of a service's gRPC face; None: in process only."""

    clients: tuple[int, ...]
    requests: int
    rounds: int
    repetitions: int
    draft_steps: int
    draft_threshold: float
    address: str | None = None

    @property
    def ways(self) -> tuple[str, ...]:
        return (IN_PROCESS,) if self.address is None else (IN_PROCESS, SERVED)


@dataclass(frozen=True, slots=True)
class Cost:
    """What the answers to all prompts took in one mode."""

    tokens: int
    num_steps: int
    num_blocks: int
    num_drafted: int
    num_accepted: int
    num_ar_blocks: int = 0
    num_diffusion_blocks: int = 0


@dataclass
class Found:
    """`runs`: by way, mode and clients, a value a round. `bare`: by number of rows."""

    bare: dict[int, Seconds] = field(default_factory=dict)
    costs: dict[Mode, Cost] = field(default_factory=dict)
    runs: dict[tuple[str, Mode, int], list[Measured]] = field(default_factory=dict)


class Experiment:
    """Modes and ways in turns, so that what else the machine does hits all alike."""

    def __init__(self, plan: Plan, workload: Workload, context: ContextTower, denoiser: DenoiserTower) -> None:
        self.plan, self.workload = plan, workload
        self._context, self._denoiser = context, denoiser
        self._settings = EngineSettings(max_sequences=max(plan.clients), max_queued_requests=4 * max(plan.clients))
        self.load_before = os.getloadavg()[0]
        self.found = Found()

    async def run(self) -> Found:
        torch.set_num_threads(1)
        plan = self.plan
        prompts = [r.prompt_token_ids for r in self.workload.requests(Mode.AR, max(plan.clients), "bare")]
        with torch.inference_mode():
            bare = Bare(self._context, self._denoiser, prompts)
            self.found.bare = {rows: bare.seconds(rows, plan.repetitions) for rows in plan.clients}
        for mode in MODES:
            self.found.costs[mode] = await self._cost(mode)
        squares = [(way, mode, clients) for clients in plan.clients for way in plan.ways for mode in MODES]
        async with InProcessPath(self._context, self._denoiser, self._settings, threads=1).open() as running:
            paths: dict[str, Path] = {IN_PROCESS: Kept(running)}
            if plan.address is not None:
                paths[SERVED] = ServedPath(plan.address)
            for number in tqdm(range(plan.rounds), unit="round", smoothing=0):
                for way, mode, clients in squares if number % 2 == 0 else squares[::-1]:
                    measured = await self._measure(paths[way], mode, clients, f"{number}-{way}")
                    self.found.runs.setdefault((way, mode, clients), []).append(measured)
        return self.found

    def floor_s(self, mode: Mode, clients: int) -> float:
        """The seconds of all answers where nothing but bare passes takes time, each of as many rows as clients."""
        cost, each = self.found.costs[mode], self.found.bare[clients].of
        last = self.plan.requests  # the last block of an answer is not read in `diffusion`; its first token is the
        reads = {  # prompt's in the other modes
            Mode.AR: (cost.tokens - last) * each[AR],
            Mode.DIFFUSION: cost.num_steps * each[STEP] + (cost.num_blocks - last) * each[COMMIT],
            Mode.VERIFIED: cost.num_steps * each[STEP] + cost.num_blocks * each[VERIFY],
        }
        return reads[mode] / clients + self.plan.requests * each[PROMPT]

    def requests(self, mode: Mode, name: str, number: int | None = None) -> list[Request]:
        """The first prompts, or all."""
        asked = self.workload.requests(mode, self.plan.requests if number is None else number, name)
        steps, threshold = self.plan.draft_steps, self.plan.draft_threshold
        return [replace(r, params=replace(r.params, draft_steps=steps, draft_threshold=threshold)) for r in asked]

    async def _cost(self, mode: Mode) -> Cost:
        counts = dict.fromkeys(("tokens", *COSTS), 0)
        async with pair_of(self._context, self._denoiser, self._settings) as pair:
            for request in self.requests(mode, f"cost-{mode}"):
                async for event in pair.generate(request):
                    counts["tokens"] += len(event.token_ids)
                    for name in COSTS:
                        counts[name] += getattr(event, name)
        return Cost(**counts)

    async def _measure(self, path: Path, mode: Mode, clients: int, number: str) -> Measured:
        name = f"{mode}-{clients}-{number}".replace(" ", "-")
        warm_up = self.requests(mode, f"{name}-warm", _WARM_UP)
        return await drive(path, warm_up, self.requests(mode, name), clients)


class Kept:
    """A path that is open already: a pair that records its passes once."""

    name = IN_PROCESS

    def __init__(self, running: Running) -> None:
        self._running = running

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Running]:
        yield self._running


def identical(some: Sequence[Measured], others: Sequence[Measured]) -> tuple[int, int]:
    """How many answers have the same tokens, of how many."""
    pairs = [
        (a.token_ids, b.token_ids)
        for one, other in zip(some, others, strict=True)
        for a, b in zip(one.answers, other.answers, strict=True)
    ]
    return sum(a == b for a, b in pairs), len(pairs)
