"""All measurements in their order: bare passes and ceilings before any engine runs, then rounds of everything."""

import asyncio
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from benchmarks.engine_parts import bare
from benchmarks.engine_parts.bare import PassTime
from benchmarks.engine_parts.ceiling import Ceiling, Costs, Demand, PassCosts, ar_ceiling, diffusion_ceiling
from benchmarks.engine_parts.load import Run, ask, closed_loop, diffusion_gaps, random_arrivals
from benchmarks.engine_parts.plan import Plan, Questions, Variant
from benchmarks.engine_parts.profile import Profile, profile
from benchmarks.engine_parts.recorder import FORWARD, Recording, Tick
from benchmarks.engine_parts.shares import step_gaps
from benchmarks.engine_parts.towers import SplitPair, split_pair
from benchmarks.reference.driver import Measured, drive
from benchmarks.reference.paths import InProcessPath, NaivePath, ServedPath
from benchmarks.reference.service import started
from twotower.core import Mode
from twotower.engine.memory import Memory, memory_of
from twotower.engine.passes import PROMPT_PARTS, SHORT_PROMPT
from twotower.model.loading import load_context_tower, load_denoiser_tower
from twotower.model.tower import ContextTower, DenoiserTower

_BLOCK = 16
PAUSE_S = 0.006  # about as long as one tower waits for the other at concurrency 1
SWEEPS = 3  # over all bare passes, of which the median counts
_ALONE_S = 0.5  # of the running requests, before the long prompt comes
_CPU = torch.device("cpu")
SERVED_TIMES = 3  # requests of a run through the service, times those of the other runs
Square = tuple[Variant, int]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of bare pass. `both`: while the other tower was passing too, each on its core. `rested`: after a pause
    of `PAUSE_S`."""

    name: str
    decide: bool = False
    eager: bool = False
    both: bool = False
    rested: bool = False


@dataclass(frozen=True, slots=True)
class Watched:
    """A run with recorders on."""

    run: Run
    recordings: Mapping[str, Recording]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A run of a pair and the CPU seconds every process took meanwhile."""

    run: Run
    cpu_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """A long prompt arriving beside running requests. Seconds; gaps are those between a request's steps."""

    before: tuple[float, ...]
    during: tuple[float, ...]
    chunks: tuple[float, ...]
    first_token_s: float


@dataclass
class Results:
    """All that was measured; lists hold one value per round."""

    passes: dict[tuple[Kind, int], PassTime] = field(default_factory=dict)
    drift: dict[tuple[str, int], float] = field(default_factory=dict)
    demands: dict[Variant, Demand] = field(default_factory=dict)
    ceilings_at: str = ""
    naive: dict[Variant, list[Measured]] = field(default_factory=dict)
    split: dict[Square, list[Loaded]] = field(default_factory=dict)
    in_process: dict[Variant, list[Measured]] = field(default_factory=dict)
    served: dict[Variant, list[Measured]] = field(default_factory=dict)
    watched: dict[Square, Watched] = field(default_factory=dict)
    mixed: list[Run] = field(default_factory=list)
    long_prompts: dict[Variant, LongPrompt] = field(default_factory=dict)
    profiles: dict[str, Profile | None] = field(default_factory=dict)
    memory: dict[str, tuple[Memory, int]] = field(default_factory=dict)

    def costs(
        self, decide: bool = False, eager: bool = False, both: bool = False, rested: bool = False, cpu: bool = False
    ) -> PassCosts:
        """Costs for the ceilings, wall or CPU time. AR steps and prompts were timed alone and without pauses only."""

        def of(kind: Kind) -> Costs:
            taken = {rows: taken for (k, rows), taken in self.passes.items() if k == kind}
            return Costs({rows: t.cpu_s if cpu else t.wall_s for rows, t in taken.items()})

        return PassCosts(
            denoise=of(Kind(bare.DENOISE, decide, eager, both, rested)),
            commit=of(Kind(bare.COMMIT, False, eager, both, rested)),
            ar=of(Kind(bare.AR, decide, eager)),
            prompt=of(Kind(bare.PROMPT, eager=eager)),
        )

    def ceiling(self, costs: PassCosts, square: Square, tokens: int) -> Ceiling:
        variant, concurrency = square
        if variant.mode is Mode.AR:
            return ar_ceiling(costs, tokens, concurrency)
        return diffusion_ceiling(costs, self.demands[variant], concurrency)


class Experiment:
    """Runs a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.questions = plan, Questions(plan)
        self.results = Results()
        self.load_before = os.getloadavg()[0]
        self._context: ContextTower = load_context_tower(plan.checkpoint, _CPU, torch.float32)
        self._denoiser: DenoiserTower = load_denoiser_tower(plan.checkpoint, _CPU, torch.float32)
        self._name = 0

    async def run(self) -> Results:
        torch.set_num_threads(self.plan.threads)
        plan = self.plan
        squares = len(plan.variants) * len(plan.concurrency)
        served = 3 * plan.rounds * 2 if plan.served else 0
        total = 1 + SWEEPS + len(plan.variants) * (1 + plan.rounds) + squares * (plan.rounds + 1) + 7 + served
        with tqdm(total=total, unit="part", smoothing=0) as self._bar:
            self._bar.set_postfix_str("starting two tower processes")
            async with split_pair(str(plan.checkpoint.directory), plan.engine, plan.threads) as split:
                await self._memory(split)
                await self._bare_passes(split)
                await self._demands()
                self._write_ceilings()
                for _ in range(plan.rounds):
                    await self._round(split)
                await self._watch(split)
                await self._mixed(split)
                for variant in (plan.variants[-2], plan.variants[-1]):
                    await self._long_prompt(split, variant)
                await self._profiles(split)
                await self._bare_again(split)
            for _ in range(plan.rounds if plan.served else 0):
                await self._served()
        return self.results

    @contextmanager
    def _part(self, what: str) -> Iterator[None]:
        self._bar.set_postfix_str(what)
        yield
        self._bar.update()

    def _fresh(self) -> str:
        self._name += 1
        return f"r{self._name}"

    async def _memory(self, split: SplitPair) -> None:
        """After a few answers, because staging buffers may grow; before the bench makes tensors of its own."""
        with self._part("memory"):
            for variant in self.plan.variants:
                await closed_loop(split.pair, self.questions.requests(variant, 2, self._fresh()), 2)
            config, engine = self.plan.checkpoint.config, self.plan.engine
            for name, actor, kind in (
                ("context", split.context, ContextTower),
                ("denoiser", split.denoiser, DenoiserTower),
            ):
                predicted = memory_of(config, engine, torch.float32, [kind], num_links=1)
                self.results.memory[name] = (predicted, await actor.tensor_bytes.remote())

    async def _bare_passes(self, split: SplitPair) -> None:
        """Several times, because the machine is faster and slower by turns."""
        with self._part("bare passes: states"):
            prompts = self.questions.rows(self.plan.most)
            for actor in (split.context, split.denoiser):
                await actor.prepare_bench.remote(prompts, self.questions.cached)
            await split.denoiser.mirror_bench.remote(await split.context.read_bench.remote())
        taken: dict[tuple[Kind, int], list[PassTime]] = {}
        for sweep in range(SWEEPS):
            with self._part(f"bare passes, {sweep + 1} of {SWEEPS}"):
                await self._sweep(split, taken)
        for which, times in taken.items():
            self.results.passes[which] = sorted(times, key=lambda time: time.wall_s)[len(times) // 2]

    async def _sweep(self, split: SplitPair, taken: dict[tuple[Kind, int], list[PassTime]]) -> None:
        """One tower after the other, after pauses, then both at once."""

        async def one(actor: object, kind: Kind, rows: int) -> None:
            call = actor.time_pass.remote  # type: ignore[attr-defined]
            pause_s, seconds = PAUSE_S if kind.rested else 0.0, self.plan.pass_s / SWEEPS
            time_taken = await call(kind.name, rows, kind.decide, kind.eager, pause_s, seconds)
            taken.setdefault((kind, rows), []).append(time_taken)

        for rows in self.plan.rows:
            for eager in (False, True):
                for decide in (False, True):
                    await one(split.denoiser, Kind(bare.DENOISE, decide, eager), rows)
                    await one(split.context, Kind(bare.AR, decide, eager), rows)
                for name in (bare.COMMIT, bare.PROMPT):
                    await one(split.context, Kind(name, eager=eager), rows)
        for decide in (False, True):
            await one(split.denoiser, Kind(bare.DENOISE, decide, rested=True), 1)
        await one(split.context, Kind(bare.COMMIT, rested=True), 1)
        for rows in self.plan.rows:
            for decide in (False, True):
                await asyncio.gather(
                    one(split.denoiser, Kind(bare.DENOISE, decide, both=True), rows),
                    one(split.context, Kind(bare.COMMIT, both=True), rows),
                )

    async def _bare_again(self, split: SplitPair) -> None:
        """A few of them at the end: how much the machine has drifted since the ceilings were written down."""
        with self._part("bare passes again"):
            for name, actor in ((bare.DENOISE, split.denoiser), (bare.COMMIT, split.context), (bare.AR, split.context)):
                for rows in {1, self.plan.most}:
                    taken = await actor.time_pass.remote(name, rows, False, False, 0.0, self.plan.pass_s)
                    self.results.drift[name, rows] = taken.wall_s / self.results.passes[Kind(name), rows].wall_s

    async def _demands(self) -> None:
        """Steps a request takes, from the naive loop: known before any engine is measured."""
        tokens = self.plan.max_new_tokens
        for variant in self.plan.variants:
            with self._part(f"naive, {variant.name}: steps"):
                measured = await self._naive(variant)
                steps = sum(answer.num_steps for answer in measured.answers) / len(measured.answers)
                if variant.mode is Mode.DIFFUSION:
                    self.results.demands[variant] = Demand(tokens, steps, -(-tokens // _BLOCK) - 1)

    def _write_ceilings(self) -> None:
        costs, tokens = self.results.costs(), self.plan.max_new_tokens
        self.results.ceilings_at = time.strftime("%H:%M:%S UTC", time.gmtime())
        for variant in self.plan.variants:
            for concurrency in self.plan.concurrency:
                ceiling = self.results.ceiling(costs, (variant, concurrency), tokens)
                tqdm.write(f"ceiling: {variant.name} at {concurrency}: {ceiling.tokens_per_s:.0f} tokens/s")

    async def _naive(self, variant: Variant) -> Measured:
        requests = self.questions.requests(variant, self.plan.prompts, self._fresh())
        warm = self.questions.requests(variant, 1, self._fresh())
        path = NaivePath(self._context, self._denoiser, self.plan.threads)
        return await drive(path, warm, requests, 1)

    async def _round(self, split: SplitPair) -> None:
        for variant in self.plan.variants:
            with self._part(f"naive, {variant.name}"):
                self.results.naive.setdefault(variant, []).append(await self._naive(variant))
            for concurrency in self.plan.concurrency:
                with self._part(f"{variant.name} at {concurrency}"):
                    count = self.plan.requests_at(concurrency)
                    loaded = await self._load(split, variant, concurrency, count)
                    self.results.split.setdefault((variant, concurrency), []).append(loaded)

    async def _load(self, split: SplitPair, variant: Variant, concurrency: int, count: int) -> Loaded:
        await closed_loop(split.pair, self.questions.requests(variant, concurrency, self._fresh()), concurrency)
        requests = self.questions.requests(variant, count, self._fresh())
        before = await split.cpu_s()
        run = await closed_loop(split.pair, requests, concurrency)
        after = await split.cpu_s()
        return Loaded(run, {name: after[name] - before[name] for name in before})

    async def _watch(self, split: SplitPair) -> None:
        for variant in self.plan.variants:
            for concurrency in self.plan.concurrency:
                with self._part(f"watched: {variant.name} at {concurrency}"):
                    count = max(self.plan.watched_per_client * concurrency, 4)
                    requests = self.questions.requests(variant, count, self._fresh())
                    await split.record(True)
                    run = await closed_loop(split.pair, requests, concurrency)
                    self.results.watched[variant, concurrency] = Watched(run, await split.record(False))

    async def _mixed(self, split: SplitPair) -> None:
        with self._part("mixed arrivals"):
            for round_number in range(self.plan.rounds):
                requests = self.questions.mixed(self.plan.arrivals_per_client * self.plan.most, self._fresh())
                run = await random_arrivals(split.pair, requests, self.plan.most, self.plan.seed + round_number)
                assert diffusion_gaps(run), "no request of more than one block"
                self.results.mixed.append(run)

    async def _long_prompt(self, split: SplitPair, variant: Variant) -> None:
        """Half of the clients run on; then the long prompt comes."""
        with self._part(f"long prompt beside {variant.name}"):
            clients = self.plan.running_beside
            requests = self.questions.requests(variant, clients, self._fresh(), 3 * self.plan.max_new_tokens)
            await split.record(True)
            running = asyncio.create_task(closed_loop(split.pair, requests, clients))
            await asyncio.sleep(_ALONE_S)
            asked = time.monotonic()
            answer = await ask(split.pair, self.questions.long(variant, self._fresh()))
            run = await running
            recordings = await split.record(False)
        leader = recordings["context" if variant.mode is Mode.AR else "denoiser"]
        chunks = self._chunk_ticks(recordings["context"], asked)
        read = max((tick.end for tick in chunks), default=answer.arrivals[0])
        self.results.long_prompts[variant] = LongPrompt(
            before=tuple(step_gaps(leader, run.started, asked, _BLOCK)),
            during=tuple(step_gaps(leader, asked, min(read, run.ended), _BLOCK)),
            chunks=tuple(
                sum(tick.seconds for tick in parts) for parts in zip(*[iter(chunks)] * PROMPT_PARTS, strict=False)
            ),
            first_token_s=answer.arrivals[0] - asked,
        )

    def _chunk_ticks(self, context: Recording, since: float) -> list[Tick]:
        """Ticks that read a part of a long chunk: `PROMPT_PARTS` of them a chunk."""
        starts = [s.start for s in context.spans if s.name == FORWARD and s.width > SHORT_PROMPT and s.start >= since]
        assert len(starts) % PROMPT_PARTS == 0, "a chunk whose parts were not all seen"
        return [tick for tick in context.ticks if any(tick.start <= start < tick.end for start in starts)]

    async def _profiles(self, split: SplitPair) -> None:
        """Of both towers in diffusion, and of the context tower in `ar`, with all clients busy."""
        for variant in (self.plan.variants[0], self.plan.variants[-1]):
            with self._part(f"profile: {variant.name}"):
                stop = asyncio.Event()

                async def client(variant: Variant = variant, stop: asyncio.Event = stop) -> None:
                    while not stop.is_set():
                        await ask(split.pair, self.questions.requests(variant, 1, self._fresh())[0])

                names = ["context"] if variant.mode is Mode.AR else ["context", "denoiser"]
                async with asyncio.TaskGroup() as clients:
                    for _ in range(self.plan.most):
                        clients.create_task(client())
                    for name in names:
                        taken = await profile(split.pids[name], self.plan.profile_s)
                        self.results.profiles[f"{name} tower, {variant.name} at {self.plan.most}"] = taken
                    stop.set()

    async def _served(self) -> None:
        """In process before the service is up and after it is down, the service in between."""
        variants = (self.plan.variants[0], self.plan.variants[-1])
        for variant in variants:
            await self._in_process(variant)
        [first] = self.questions.requests(variants[0], 1, self._fresh())
        async with started([f"model.checkpoint={self.plan.checkpoint.directory}"], first) as service:
            for variant in variants:
                with self._part(f"served, {variant.name}"):
                    measured = await self._drive(ServedPath(service.address), variant)
                    self.results.served.setdefault(variant, []).append(measured)
        for variant in variants:
            await self._in_process(variant)

    async def _in_process(self, variant: Variant) -> None:
        with self._part(f"in process, {variant.name}"):
            path = InProcessPath(self._context, self._denoiser, self.plan.engine, self.plan.threads)
            self.results.in_process.setdefault(variant, []).append(await self._drive(path, variant))

    async def _drive(self, path: InProcessPath | ServedPath, variant: Variant) -> Measured:
        most = self.plan.most
        warm = self.questions.requests(variant, most, self._fresh())
        # At full load all answers end together, and how soon the next ones are there is luck: several times over.
        count = SERVED_TIMES * self.plan.requests_at(most)
        requests = self.questions.requests(variant, count, self._fresh())
        return await drive(path, warm, requests, most)
