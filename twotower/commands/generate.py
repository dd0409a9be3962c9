"""`generate`: one prompt to the terminal, or a file of prompts to a file of answers."""

import asyncio
import json
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import torch
from tqdm import tqdm

from twotower.commands.orders import BadLine, Model, Order, open_model, order_of, read_orders
from twotower.commands.output import whole_file
from twotower.commands.parameter_flags import given_parameters, given_telling
from twotower.commands.results import Result, decode
from twotower.commands.told import Piece
from twotower.commands.views import view_of
from twotower.core import PRIORITY, Mode, TraceEvent
from twotower.device_names import check_dtype
from twotower.engine.in_process import open_pair, pick_device
from twotower.engine.pair import Pair
from twotower.engine.settings import EngineSettings
from twotower.errors import InvalidRequest, TwoTowerError, Unavailable
from twotower.expert_formats import ExpertFormat
from twotower.model.pages import page_tokens_on, pages_for
from twotower.model.threads import threads_for
from twotower.text.token_texts import TokenTexts
from twotower.validation import check_terms

_MAX_SEQUENCES = 32
# The number of orders given to the pair at a time, and the length of the pair's queue. An order may have ended before
# its room is free, so counting rooms would not do.
_IN_FLIGHT = 288
_BIG_CHECKPOINT_BYTES = 256 * 2**20

_Outcome = Result | TwoTowerError
_Told = Piece | TraceEvent


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many orders ended normally, and how many failed. Bad lines count as failed."""

    num_done: int
    num_failed: int


def generate(options: Namespace) -> Outcome:
    """Raises InvalidRequest, CheckpointError or ConfigError before a tower is loaded, other TwoTowerErrors after."""
    pick_device(options.device)
    check_dtype(options.dtype)
    form = ExpertFormat.of(options.experts, options.expert_group)
    model = open_model(options.checkpoint, options.max_sequence_length, form)
    torch.set_num_threads(threads_for(model.checkpoint.config, torch.get_num_threads()))
    given = given_parameters(options)
    if options.input is None:
        return _generate_one(options, model, given)
    return _generate_many(options, model, given)


def _generate_one(options: Namespace, model: Model, given: dict[str, object]) -> Outcome:
    source = "prompt" if options.prompt is not None else "prompt_token_ids"
    values = {source: getattr(options, source), "stop": options.stop, **given, **given_telling(options)}
    order, texts = order_of(values, model), TokenTexts(model.tokenizer)
    view = view_of(order.request.trace, order.request.logprobs is not None, texts)

    async def run() -> Result:
        async with _pair(options, model, [order]) as pair:
            if options.json:
                return await decode(pair, order, model.tokenizer)
            return await decode(pair, order, model.tokenizer, view.hear)

    result = asyncio.run(run())
    if options.json:
        print(_json(result.fields(order, texts)), flush=True)
    else:
        view.end()
        print(_summary(result), file=sys.stderr)
    return Outcome(1, 0)


def _generate_many(options: Namespace, model: Model, given: dict[str, object]) -> Outcome:
    if options.output.exists() and options.input.exists() and options.output.samefile(options.input):
        raise InvalidRequest.of("--output", f"{options.output}: is the --input file, wanted another one")
    orders, num_skipped = _good_lines(options, model, given)
    count = _Count()
    with whole_file(options.output) as file:
        if orders:
            asyncio.run(_run_many(options, model, orders, file.write, count))
    print(
        f"{count.done} of {len(orders)} requests done, {count.tokens} tokens in {count.seconds:.1f} s "
        f"({count.rate:.0f} tokens/s)",
        file=sys.stderr,
    )
    return Outcome(count.done, len(orders) - count.done + num_skipped)


def _good_lines(options: Namespace, model: Model, given: dict[str, object]) -> tuple[list[Order], int]:
    """The orders of all good lines, and the number of bad lines, which are reported. Raises InvalidRequest if there are
    too many bad lines.
    """
    telling = given_telling(options)
    check_terms(given, PRIORITY.default, model.limits, **telling)
    lines = list(read_orders(options.input, model, given | telling | {"stop": options.stop}))
    bad = [line for line in lines if isinstance(line, BadLine)]
    good = [line for line in lines if isinstance(line, Order)]
    for line in bad:
        print(f"{options.input}:{line.number}: {' '.join(str(line.error).split())}", file=sys.stderr)
    if bad and (options.strict or not good):
        raise InvalidRequest.of("--input", f"{options.input}: {len(bad)} bad lines of {len(lines)}, nothing decoded")
    if bad:
        print(f"{options.input}: {len(bad)} bad lines of {len(lines)} skipped", file=sys.stderr)
    return good, len(bad)


@dataclass(slots=True)
class _Count:
    """What a run has done so far, and the time since its towers were loaded."""

    done: int = 0
    tokens: int = 0
    seconds: float = 0.0
    started: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def start(self) -> None:
        self.started = time.perf_counter()

    def add(self, tokens: int) -> None:
        self.tokens += tokens
        self.seconds = time.perf_counter() - self.started


async def _run_many(
    options: Namespace, model: Model, orders: Sequence[Order], write: Callable[[str], object], count: _Count
) -> None:
    """Decode all, write results in order."""
    texts = TokenTexts(model.tokenizer)
    async with _pair(options, model, orders) as pair:
        count.start()
        with tqdm(total=len(orders), unit="request", disable=None) as bar:

            def hear(told: _Told) -> None:
                if isinstance(told, Piece):
                    count.add(len(told.token_ids))
                    bar.set_postfix_str(f"{count.rate:.0f} tokens/s", refresh=False)

            async for order, outcome in _in_order(pair, orders, model, hear):
                bar.update()
                if isinstance(outcome, Result):
                    write(_json(outcome.fields(order, texts)) + "\n")
                    count.done += 1
                elif options.strict or isinstance(outcome, Unavailable):
                    raise outcome
                else:
                    bar.write(f"{options.input}:{order.request.id}: {outcome}", file=sys.stderr)


async def _in_order(
    pair: Pair, orders: Iterable[Order], model: Model, hear: Callable[[_Told], None]
) -> AsyncIterator[tuple[Order, _Outcome]]:
    """Orders with their results, in order; at most as many at a time as the pair's queue holds."""
    window: deque[tuple[Order, asyncio.Task[_Outcome]]] = deque()
    try:
        for order in orders:
            window.append((order, asyncio.create_task(_outcome(pair, order, model, hear))))
            if len(window) >= _IN_FLIGHT:
                yield await _first(window)
        while window:
            yield await _first(window)
    finally:
        for _, task in window:
            task.cancel()
        await asyncio.gather(*(task for _, task in window), return_exceptions=True)


async def _first(window: deque[tuple[Order, asyncio.Task[_Outcome]]]) -> tuple[Order, _Outcome]:
    order, task = window[0]
    outcome = await task
    window.popleft()
    return order, outcome


async def _outcome(pair: Pair, order: Order, model: Model, hear: Callable[[_Told], None]) -> _Outcome:
    try:
        return await decode(pair, order, model.tokenizer, hear)
    except TwoTowerError as error:
        return error


def _pair(options: Namespace, model: Model, orders: Sequence[Order]) -> AbstractAsyncContextManager[Pair]:
    """A running pair whose cache holds what these orders need at once, and not more."""
    page_tokens = page_tokens_on(pick_device(options.device).type)
    wanted = sorted((pages_for(order.request.positions, page_tokens) for order in orders), reverse=True)
    settings = EngineSettings(
        max_sequences=min(len(orders), _MAX_SEQUENCES),
        max_sequence_length=model.limits.max_sequence_length,
        cache_tokens=sum(wanted[:_MAX_SEQUENCES]) * page_tokens,
        max_queued_requests=_IN_FLIGHT,
        experts=options.experts,
        expert_group=options.expert_group,
    )
    big = model.nbytes > _BIG_CHECKPOINT_BYTES
    return open_pair(model.directory, settings, options.device, options.dtype, progress=big)


def _cost(result: Result) -> str:
    blocks, steps = f"{result.num_blocks} blocks", f"{result.num_steps} steps"
    drafted = f"{result.num_accepted} of {result.num_drafted} drafted tokens accepted"
    if result.mode is Mode.VERIFIED:
        return f"{result.num_blocks} rounds, {steps}, {drafted}"
    if result.mode is Mode.AUTO:
        by_mode = f"{result.num_ar_blocks} by ar, {result.num_diffusion_blocks} by diffusion"
        return f"{blocks} ({by_mode}), {steps}, {drafted}"
    return f"{blocks}, {steps}"


def _summary(result: Result) -> str:
    count = len(result.token_ids)
    return (
        f"{count} tokens in {result.seconds:.2f} s ({count / max(result.seconds, 1e-9):.1f} tokens/s), "
        f"{result.mode}: {_cost(result)}; "
        f"finished by {result.finish_reason}, seed {result.seed}"
    )


def _json(values: dict[str, object]) -> str:
    return json.dumps(values, ensure_ascii=False, allow_nan=False)
