"""The start-up self-test: a few tokens in every mode, then the checkpoint's own sample, before a pair is offered to
anyone.

A broken kernel stack shows here, as one clear error, and not in a user's answer.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.engine.expectation import Expectation, Known, Outcome
from twotower.engine.pair import Pair
from twotower.errors import Overloaded, TwoTowerError, Unavailable
from twotower.model.pages import pages_for

_PROMPT = (1, 2, 3, 4, 5)
_BLOCK = 16  # answers are asked for in whole blocks
_PAUSE_S = 0.005

logger = logging.getLogger(__name__)


async def self_test(pair: Pair, modes: Sequence[Mode], timeout_s: float, expected: Expectation | None = None) -> None:
    """Decode a short prompt in each mode, then what the checkpoint knows the answers to.

    Raises Unavailable with the mode and the reason.
    """
    for mode in modes:
        try:
            await _count_tokens(pair, mode, timeout_s)
            if expected is not None:
                await _check(pair, expected, mode, timeout_s)
        except TwoTowerError as error:
            raise Unavailable(f"self-test in {mode} mode failed: {error}") from error


async def decode_sample(pair: Pair, sample: Sequence[Known], mode: Mode, timeout_s: float) -> list[Outcome]:
    """What the pair makes of the sample, in order: greedily, as many at once as it has room for."""
    room = pair.ledger.context
    limit = asyncio.Semaphore(max(1, min(room.slots, room.pages // max(map(_pages, sample)))))

    async def decode(number: int, known: Known) -> Outcome:
        async with limit:
            return await _decode(pair, known, mode, number, timeout_s)

    return await asyncio.gather(*(decode(number, known) for number, known in enumerate(sample)))


async def _count_tokens(pair: Pair, mode: Mode, timeout_s: float) -> None:
    wanted = 17 if mode is Mode.DIFFUSION else 3
    params = DecodingParams(mode=mode, max_new_tokens=wanted, ignore_eos=True)
    request = Request(RequestId(f"self-test-{mode}"), _PROMPT, params)
    got = sum([len(event.token_ids) async for event in pair.generate(request, timeout_s)])
    if got != wanted:
        raise Unavailable(f"got {got} tokens, wanted {wanted}")


async def _check(pair: Pair, expected: Expectation, mode: Mode, timeout_s: float) -> None:
    bounds = next((bounds for bounds in expected.bounds if bounds.mode is mode), None)
    if bounds is None:
        return
    if max(map(_pages, expected.sample)) > pair.ledger.context.pages:
        logger.warning("self-test in %s mode: the cache is too small for the checkpoint's own sample; left out", mode)
        return
    outcomes = await decode_sample(pair, expected.sample, mode, timeout_s)
    short = bounds.shortfall(expected.sample, outcomes)
    if short is not None:
        raise Unavailable(f"{short}: kernels, cache or exchange do not do what these weights were trained with")
    logger.info("self-test in %s mode: %d known prompts are within the checkpoint's bounds", mode, len(outcomes))


def _params(known: Known, mode: Mode) -> DecodingParams:
    return DecodingParams(mode=mode, max_new_tokens=-(-len(known.answer_token_ids) // _BLOCK) * _BLOCK)


def _pages(known: Known) -> int:
    return pages_for(_request(known, Mode.DIFFUSION, 0).positions)


def _request(known: Known, mode: Mode, number: int) -> Request:
    return Request(RequestId(f"self-test-{mode}-{number}"), known.prompt_token_ids, _params(known, mode))


async def _decode(pair: Pair, known: Known, mode: Mode, number: int, timeout_s: float) -> Outcome:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            events = [event async for event in pair.generate(_request(known, mode, number), timeout_s)]
            break
        except Overloaded:
            # A sequence's room is back a moment after its last event, and there may be no queue to wait in.
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(_PAUSE_S)
    tokens = tuple(token for event in events for token in event.token_ids)
    return Outcome(tokens, sum(event.num_steps for event in events) if mode is Mode.DIFFUSION else len(tokens))
