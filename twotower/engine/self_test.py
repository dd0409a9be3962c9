"""The start-up self-test: a few tokens in every mode, then the checkpoint's own sample, before a pair serves requests.

A broken kernel stack shows here, as one clear error, and not in a user's answer. The context tower keeps nothing of the
test's prompts: nobody will ask for them again.
"""

import asyncio
import logging
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from twotower.core import DecodingParams, Mode, Request, RequestId, ScoreRequest
from twotower.engine.expectation import Expectation, Known, Outcome
from twotower.engine.pair import Pair, Trial
from twotower.errors import Overloaded, TwoTowerError, Unavailable
from twotower.model.room import Room

_PROMPT = (1, 2, 3, 4, 5)
_BLOCK = 16  # answers are asked for in whole blocks
_THRESHOLD = 0.9  # of diffusion: at a higher threshold than usual, the pace shows more faults
_PAUSE_S = 0.005

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


async def self_test(
    pair: Pair | Trial, modes: Sequence[Mode], timeout_s: float, expected: Expectation | None = None
) -> None:
    """Decode a short prompt in each mode, then the checkpoint's sample; if `ar` is among the modes, score the sample's
    texts, too.

    Raises Unavailable with what was tried and the reason.
    """
    if expected is not None and _most_pages(pair.ledger.context, expected.sample) > pair.ledger.context.pages:
        logger.warning("self-test: the cache is too small for the checkpoint's own sample; left out")
        expected = None
    for mode in modes:
        with _named(f"in {mode} mode"):
            await _count_tokens(pair, mode, timeout_s)
            if expected is not None:
                await _check_answers(pair, expected, mode, timeout_s)
    if expected is not None and Mode.AR in modes:
        with _named("of scores"):
            _refuse(expected.misread(await score_sample(pair, expected.sample, timeout_s)))
            logger.info("self-test of scores: %d known texts are as likely as they should be", len(expected.sample))


async def decode_sample(pair: Pair | Trial, sample: Sequence[Known], mode: Mode, timeout_s: float) -> list[Outcome]:
    """The pair's results for the sample, in order: greedy, with as many at a time as it has room for."""

    async def decode(number: int, known: Known) -> Outcome:
        request = _request(known, mode, number)
        events = [event async for event in pair.generate(request, timeout_s)]
        tokens = tuple(token for event in events for token in event.token_ids)
        return Outcome(tokens, sum(event.num_steps for event in events) if mode is Mode.DIFFUSION else len(tokens))

    return await _of_all(pair, sample, decode, timeout_s)


async def score_sample(pair: Pair | Trial, sample: Sequence[Known], timeout_s: float) -> list[float]:
    """The mean log-probability of each text of the sample, in order: see `Known.mean_log_prob`."""

    async def score(number: int, known: Known) -> float:
        text = known.prompt_token_ids + known.answer_token_ids
        request = ScoreRequest(RequestId(f"self-test-score-{number}"), text, 1, cache_salt=None)
        event = await pair.score(request, timeout_s)
        return statistics.mean(event.log_probs)

    return await _of_all(pair, sample, score, timeout_s)


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except TwoTowerError as error:
        raise Unavailable(f"self-test {what} failed: {error}") from error


async def _count_tokens(pair: Pair | Trial, mode: Mode, timeout_s: float) -> None:
    wanted = 3 if mode.by_token else 17
    params = DecodingParams(mode=mode, max_new_tokens=wanted, ignore_eos=True)
    request = Request(RequestId(f"self-test-{mode}"), _PROMPT, params, cache_salt=None)
    got = sum([len(event.token_ids) async for event in pair.generate(request, timeout_s)])
    if got != wanted:
        raise Unavailable(f"got {got} tokens, wanted {wanted}")


async def _check_answers(pair: Pair | Trial, expected: Expectation, mode: Mode, timeout_s: float) -> None:
    alike = Mode.AR if mode in (Mode.VERIFIED, Mode.AUTO) else mode  # its answers are that mode's
    bounds = next((bounds for bounds in expected.bounds if bounds.mode is alike), None)
    if bounds is None:
        return
    outcomes = await decode_sample(pair, expected.sample, mode, timeout_s)
    _refuse(bounds.shortfall(expected.sample, outcomes))
    logger.info("self-test in %s mode: %d known prompts are within the checkpoint's bounds", mode, len(outcomes))


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise Unavailable(f"{problem}: kernels, cache or exchange do not do what these weights were trained with")


async def _of_all(
    pair: Pair | Trial, sample: Sequence[Known], ask: Callable[[int, Known], Awaitable[Answer]], timeout_s: float
) -> list[Answer]:
    room = pair.ledger.context
    limit = asyncio.Semaphore(max(1, min(room.free_slots, room.free_pages // _most_pages(room, sample))))

    async def patiently(number: int, known: Known) -> Answer:
        async with limit:
            deadline = time.monotonic() + timeout_s
            while True:
                try:
                    return await ask(number, known)
                except Overloaded:
                    # A sequence's room is back a moment after its last event, and there may be no queue to wait in.
                    if time.monotonic() > deadline:
                        raise
                    await asyncio.sleep(_PAUSE_S)

    return await asyncio.gather(*(patiently(number, known) for number, known in enumerate(sample)))


def _params(known: Known, mode: Mode) -> DecodingParams:
    longest = -(-len(known.answer_token_ids) // _BLOCK) * _BLOCK
    return DecodingParams(mode=mode, max_new_tokens=longest, confidence_threshold=_THRESHOLD)


def _most_pages(room: Room, sample: Sequence[Known]) -> int:
    return max(room.pages_for(_request(known, mode, 0).positions) for known in sample for mode in Mode)


def _request(known: Known, mode: Mode, number: int) -> Request:
    name = RequestId(f"self-test-{mode}-{number}")
    return Request(name, known.prompt_token_ids, _params(known, mode), cache_salt=None)
