"""One run of the whole comparison: paths interleaved, several rounds, so that drift of the machine hits all alike."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from benchmarks.reference.driver import Measured, drive
from benchmarks.reference.forwards import ForwardTime, compare_forwards
from benchmarks.reference.paths import InProcessPath, NaivePath, Path, ServedPath
from benchmarks.reference.service import Service, started
from benchmarks.reference.workload import Workload
from twotower.core import Mode
from twotower.engine.settings import EngineSettings
from twotower.model.tower import ContextTower, DenoiserTower

PATHS = ("naive", "in_process_eager", "in_process", "served")
_WARM_UP = 2
_CALIBRATION_REQUESTS = 16
_CLEARLY_FASTER = 0.9  # of the time with fewer threads
_PER_CLIENT = 8


@dataclass(frozen=True)
class Plan:
    """What to run. `threads` None: 1 for each local path, or torch's default where that is clearly faster."""

    paths: tuple[str, ...] = PATHS
    modes: tuple[Mode, ...] = (Mode.DIFFUSION, Mode.AR)
    concurrency: tuple[int, ...] = (1, 4, 16)
    requests: int = 64
    per_client: int = _PER_CLIENT
    repeats: int = 3
    threads: int | None = None
    service_settings: tuple[str, ...] = ()
    forward_lengths: tuple[int, ...] = (32, 256)
    forward_repetitions: int = 50

    def requests_at(self, concurrency: int) -> int:
        """Enough that the clients are busy together for most of the run."""
        return max(self.requests, self.per_client * concurrency)


@dataclass(frozen=True, slots=True)
class Cell:
    """One square of the result."""

    mode: Mode
    concurrency: int
    path: str


@dataclass
class Results:
    """All that was measured. `runs` holds a value per round; `threads_tried` maps path and threads to seconds."""

    threads: dict[str, int] = field(default_factory=dict)
    threads_tried: dict[tuple[str, int], float] = field(default_factory=dict)
    forwards: list[ForwardTime] = field(default_factory=list)
    runs: dict[Cell, list[Measured]] = field(default_factory=dict)
    cold_starts: list[Service] = field(default_factory=list)


class Experiment:
    """Runs a plan on loaded towers."""

    def __init__(self, plan: Plan, workload: Workload, context: ContextTower, denoiser: DenoiserTower) -> None:
        self.plan, self.workload = plan, workload
        self._context, self._denoiser = context, denoiser
        self._default_threads = torch.get_num_threads()
        self.load_before = os.getloadavg()[0]
        self.results = Results()

    async def run(self) -> Results:
        plan = self.plan
        squares = len(plan.modes) * len(plan.concurrency)
        local = [name for name in plan.paths if name != "served"]
        with tqdm(total=1 + plan.repeats * squares * len(plan.paths), unit="run", smoothing=0) as self._bar:
            for name in local:
                self.results.threads[name] = await self._choose_threads(name)
            self._compare_forwards()
            for round_number in range(plan.repeats):
                await self._round(round_number, local)
        return self.results

    def path(self, name: str, threads: int) -> Path:
        """A path of this process."""
        if name == "naive":
            return NaivePath(self._context, self._denoiser, threads)
        most = max(self.plan.concurrency)
        capture = "off" if name == "in_process_eager" else "auto"
        settings = EngineSettings(
            max_sequences=most, max_sequence_length=512, max_queued_requests=4 * most, capture=capture
        )
        return InProcessPath(self._context, self._denoiser, settings, threads, name)

    async def _round(self, number: int, local: Sequence[str]) -> None:
        # Whoever went first in one round goes last in the next.
        order = local if number % 2 == 0 else local[::-1]
        for mode in self.plan.modes:
            for concurrency in self.plan.concurrency:
                for name in order:
                    await self._measure(self.path(name, self.results.threads[name]), mode, concurrency, number)
        if "served" in self.plan.paths:
            # Up only while it is measured: an idle service takes CPU time from the others.
            self._bar.set_postfix_str("starting the service")
            [first] = self.workload.requests(self.plan.modes[0], 1, f"first-{number}")
            async with started(self._service_settings(), first) as service:
                self.results.cold_starts.append(service)
                for mode in self.plan.modes:
                    for concurrency in self.plan.concurrency:
                        await self._measure(ServedPath(service.address), mode, concurrency, number)

    async def _measure(self, path: Path, mode: Mode, concurrency: int, number: int) -> None:
        self._bar.set_postfix_str(f"{path.name} {mode} x{concurrency}")
        name = f"{path.name}-{mode}-{concurrency}-{number}"
        warm_up = self.workload.requests(mode, _WARM_UP, f"{name}-warm")
        requests = self.workload.requests(mode, self.plan.requests_at(concurrency), name)
        measured = await drive(path, warm_up, requests, concurrency)
        self.results.runs.setdefault(Cell(mode, concurrency, path.name), []).append(measured)
        self._bar.update()

    async def _choose_threads(self, name: str) -> int:
        if self.plan.threads is not None:
            return self.plan.threads
        self._bar.set_postfix_str(f"{name}: choosing threads")
        best, best_s = 1, await self._try_threads(name, 1, limit_s=float("inf"))
        if self._default_threads > 1:
            seconds = await self._try_threads(name, self._default_threads, limit_s=best_s)
            if seconds < _CLEARLY_FASTER * best_s:
                best = self._default_threads
        return best

    async def _try_threads(self, name: str, threads: int, limit_s: float) -> float:
        """Seconds for a few requests; those so far where they are more than `limit_s` already."""
        seconds = 0.0
        for mode in self.plan.modes:
            requests = self.workload.requests(mode, 1 + _CALIBRATION_REQUESTS, f"try-{threads}-{mode}")
            seconds += (await drive(self.path(name, threads), requests[:1], requests[1:], 4)).seconds
            if seconds > limit_s:
                break
        self.results.threads_tried[name, threads] = seconds
        return seconds

    def _compare_forwards(self) -> None:
        self._bar.set_postfix_str("bare tower passes")
        torch.set_num_threads(self.results.threads.get("naive", self._default_threads))
        for cached in self.plan.forward_lengths:
            self.results.forwards += compare_forwards(
                self._context, self._denoiser, cached, self.plan.forward_repetitions
            )
        self._bar.update()

    def _service_settings(self) -> list[str]:
        return [f"model.checkpoint={self.workload.checkpoint.directory}", *self.plan.service_settings]
