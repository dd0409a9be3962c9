"""`bench` from its flags to its report."""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from twotower.commands.bench.arguments import Plan, plan_of
from twotower.commands.bench.compare import compared
from twotower.commands.bench.driver import Driver
from twotower.commands.bench.figures import Figures, figures_of
from twotower.commands.bench.load import Load
from twotower.commands.bench.plot import draw
from twotower.commands.bench.prompts import Prompt, demo_prompts, file_prompts
from twotower.commands.bench.report import Run
from twotower.commands.bench.samples import Pass, Sample
from twotower.commands.output import whole_file
from twotower.errors import ConfigError, InvalidRequest, Unavailable
from twotower_client import AsyncClient, Event, ModelInfo, RetryPolicy, ServiceError, Tls
from twotower_client import InvalidRequest as Refused

ONCE = RetryPolicy(attempts=1)  # what fails is counted, not asked again


def bench(options: argparse.Namespace) -> int:
    """Returns the number of failed requests. Raises InvalidRequest or ConfigError for unusable input, and Unavailable
    if the service does not answer.
    """
    if options.compare is not None:
        print(compared(*options.compare))
        return 0
    plan = plan_of(options)
    prompts = demo_prompts(plan.family, plan.seed) if plan.prompts is None else file_prompts(plan.prompts, plan.seed)
    if plan.output is not None and not plan.output.absolute().parent.is_dir():
        raise InvalidRequest.of("--output", f"{plan.output.parent}: no such directory")
    run = asyncio.run(Bench(plan, prompts).run())
    print(run.text())
    if plan.output is not None:
        write(run, plan.output)
    return sum(one.failed for one in run.figures)


def write(run: Run, prefix: Path) -> None:
    """PREFIX.json, PREFIX.md and, where matplotlib is there, PREFIX.png."""
    paths = [prefix.with_name(prefix.name + ending) for ending in (".json", ".md", ".png")]
    for path, text in zip(paths, (json.dumps(run.as_json()), run.markdown()), strict=False):
        with whole_file(path) as file:
            file.write(text + "\n")
    try:
        draw(run.figures, paths[2])
    except ConfigError as error:
        print(error, file=sys.stderr)
        del paths[2]
    print(f"wrote {', '.join(map(str, paths))}", file=sys.stderr)


class Bench:
    """One run of the passes of a plan."""

    def __init__(self, plan: Plan, prompts: Sequence[Prompt]) -> None:
        self._plan, self._prompts = plan, prompts
        self._clients: list[AsyncClient] = []

    async def run(self) -> Run:
        began, started, load = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic(), os.getloadavg()
        async with AsyncExitStack() as opened:
            most = max(map(self._plan.connected, self._plan.loads))
            self._clients = [await opened.enter_async_context(self._opened()) for _ in range(most)]
            model = await self._model(self._clients[0])
            passes = await self._passes()
        default = str((model.defaults or {}).get("mode", "the service's mode"))
        groups: dict[tuple[Load, str | None], list[Pass]] = {}
        for one in passes:
            groups.setdefault((one.load, one.mode), []).append(one)
        figures: list[Figures] = [figures_of(rounds, default) for rounds in groups.values()]
        return Run(self._plan, model, began, time.monotonic() - started, load, figures, passes)

    def _opened(self) -> AsyncClient:
        try:
            tls = Tls(*self._plan.tls) if any(self._plan.tls) else None
            return AsyncClient(self._plan.url, tls=tls, retry=ONCE)
        except ValueError as error:
            raise InvalidRequest.of("--url and TLS", str(error)) from None

    async def _model(self, client: AsyncClient) -> ModelInfo:
        try:
            model = await client.model(timeout_s=10.0)
        except ServiceError as error:
            raise Unavailable(f"{self._plan.url}: {error}") from None
        missing = [mode for mode in self._plan.modes if mode is not None and mode not in model.modes]
        if missing:
            raise InvalidRequest.of("--mode", f"got {missing[0]}, but {model.name} serves {', '.join(model.modes)}")
        if model.has_tokenizer is False and any(isinstance(prompt, str) for prompt in self._prompts):
            raise InvalidRequest.of("--prompts", f"{model.name} has no tokenizer: wanted prompt_token_ids")
        return model

    async def _passes(self) -> list[Pass]:
        """Rounds go through the passes in turns, forth and back."""
        plan = self._plan
        order = [(load, mode) for load in plan.loads for mode in plan.modes]
        passes = []
        for round_ in range(plan.rounds):
            for load, mode in order if round_ % 2 == 0 else reversed(order):
                await self._warm_up(load, mode)
                passes.append(await self._pass(load, mode, round_))
        found = {(load, mode): place for place, (load, mode) in enumerate(order)}
        return sorted(passes, key=lambda one: (found[one.load, one.mode], one.round))

    async def _warm_up(self, load: Load, mode: str | None) -> None:
        """A request that cannot be served fails here, before anything is measured."""
        count = self._plan.warm_ups(load)
        waiting = iter(range(count))

        async def one_client() -> None:
            for number in waiting:
                async with self._send(load, mode, number) as events:
                    async for _ in events:
                        pass

        try:
            async with asyncio.TaskGroup() as clients:
                for _ in range(min(load.clients or 4, count)):
                    clients.create_task(one_client())
        except* Refused as group:
            raise InvalidRequest.of(f"{mode or 'request'}", str(_first(group))) from None
        except* ServiceError as group:
            raise Unavailable(f"{self._plan.url}, while warming up: {_first(group)}") from None

    async def _pass(self, load: Load, mode: str | None, round_: int) -> Pass:
        name = f"{mode or 'default'}, {load.name}" + (f", round {round_ + 1}" if self._plan.rounds > 1 else "")
        began, tokens, failed = time.monotonic(), 0, 0
        with tqdm(total=load.requests, desc=name, unit=" requests", file=sys.stderr, disable=None, leave=False) as bar:

            def told(sample: Sample) -> None:
                nonlocal tokens, failed
                tokens += sample.usage.completion_tokens
                failed += sample.error is not None
                bar.set_postfix_str(
                    f"{tokens / (time.monotonic() - began):.0f} tokens/s" + (f", {failed} failed" if failed else ""),
                    refresh=False,
                )
                bar.update()

            driver = Driver(lambda number: self._send(load, mode, number), load, self._plan.seed, told)
            return await driver.run(mode, round_)

    def _send(self, load: Load, mode: str | None, number: int) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Over one connection after the other."""
        client = self._clients[number % self._plan.connected(load)]
        return client.stream(self._prompts[number % len(self._prompts)], **self._plan.options(mode, number))


def _first(group: BaseExceptionGroup[ServiceError]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
