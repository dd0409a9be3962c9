"""A device without memory for one pass: that pass is made in halves, or its rows fail, and all else goes on."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from tests.engine.decode import SETTINGS as USUAL
from tests.engine.decode import collect, decode_all
from tests.goldens import vendored
from twotower.core import DecodingParams, Mode, Request, RequestId, ScoreRequest
from twotower.engine.in_process import pair_of
from twotower.engine.pair import Pair
from twotower.engine.runner import EngineRunner
from twotower.engine.short_memory import ShortMemory
from twotower.errors import Overloaded
from twotower.model.tower import Layer, Tower

SETTINGS = replace(USUAL, capture="off")  # a recorded pass runs no hook
Refuses = Callable[[int, int], bool]  # by rows and width
MODES = (Mode.DIFFUSION, Mode.VERIFIED, Mode.AR, Mode.MOCK_AR)
PROMPTS = ((5, 6, 7, 8), (9, 5, 6), (7, 7, 4, 8, 9))


def _requests(mode: Mode, new: int = 20) -> list[Request]:
    params = DecodingParams(mode=mode, max_new_tokens=new, ignore_eos=True, confidence_threshold=0.3, temperature=0.0)
    return [Request(RequestId(f"{mode}{number}"), prompt, params) for number, prompt in enumerate(PROMPTS)]


@contextmanager
def short(tower: Tower, refuses: Refuses, layer: int = 2) -> Iterator[list[int]]:
    """No memory in front of this layer, for passes of which that is said. Yields the rows of those. What the layers
    before it have done is done."""
    refused: list[int] = []

    def look(_: Layer, given: tuple[Any, ...]) -> None:
        rows, width = given[0].shape[:2]
        if refuses(rows, width):
            refused.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 13 GiB.")

    hook = cast(Layer, tower.layers[layer]).register_forward_pre_hook(look)
    try:
        yield refused
    finally:
        hook.remove()


def once(test: Refuses) -> Refuses:
    done: list[bool] = []

    def refuses(rows: int, width: int) -> bool:
        if done or not test(rows, width):
            return False
        done.append(True)
        return True

    return refuses


async def _outcomes(pair: Pair, requests: Sequence[Request]) -> list[list[int] | BaseException]:
    async def tokens(request: Request) -> list[int]:
        return (await collect(pair, request)).token_ids

    return list(await asyncio.gather(*map(tokens, requests), return_exceptions=True))


def _undisturbed(requests: Sequence[Request]) -> list[list[int]]:
    model = vendored("tt_moe")
    return [each.token_ids for each in decode_all(model.context, model.denoiser, requests, settings=SETTINGS)]


def _counted(pair: Pair) -> int:
    runner = pair.context
    assert isinstance(runner, EngineRunner)
    return sum(engine.stats(0.0).out_of_memory for engine in runner.engines)


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.VERIFIED, Mode.MOCK_AR])
@pytest.mark.slow
async def test_a_denoiser_steps_in_halves_what_it_cannot_step_at_once(mode: Mode) -> None:
    model = vendored("tt_moe")
    wanted = await asyncio.to_thread(_undisturbed, _requests(mode))
    with short(model.denoiser, lambda rows, _: rows > 1) as refused:
        async with pair_of(model.context, model.denoiser, SETTINGS) as pair:
            assert await _outcomes(pair, _requests(mode)) == wanted
            assert _counted(pair) == len(refused) > 0


async def test_a_row_for_which_there_is_no_memory_alone_fails_alone() -> None:
    model = vendored("tt_moe")
    requests = _requests(Mode.DIFFUSION)
    wide = Request(RequestId("wide"), PROMPTS[0], DecodingParams(max_new_tokens=64, block_size=64))
    wanted = await asyncio.to_thread(_undisturbed, requests)
    with short(model.denoiser, lambda _, width: width > 16):
        async with pair_of(model.context, model.denoiser, SETTINGS) as pair:
            *others, failed = await _outcomes(pair, [*requests, wide])
            assert others == wanted and isinstance(failed, Overloaded)
            assert str(failed) == "the denoiser tower's device has no memory for a pass over 1 rows"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ["prompts", "blocks"])
@pytest.mark.slow
async def test_rows_of_a_pass_that_breaks_off_fail_and_their_slots_serve_others(mode: Mode, what: str) -> None:
    """The first such pass leaves half of its layers' states moved on. Whoever has the slots next sees none of that."""
    model = vendored("tt_moe")
    prompts = [tuple(range(4, 40 + number)) for number in range(3)]
    requests = [Request(each.id, prompt, each.params) for each, prompt in zip(_requests(mode), prompts, strict=True)]
    wanted = await asyncio.to_thread(_undisturbed, requests)
    splits = mode is Mode.VERIFIED and what == "blocks"  # a check of drafts changes nothing before it settles

    def is_the_one(rows: int, width: int) -> bool:
        if what == "prompts":
            return width > 30
        return width <= 16 and (not splits or (rows > 1 and width > 1))

    async with pair_of(model.context, model.denoiser, SETTINGS) as pair:
        with short(model.context, once(is_the_one)) as refused:
            outcomes = await _outcomes(pair, requests)
        failed = [isinstance(outcome, Overloaded) for outcome in outcomes]
        assert sum(failed) == (0 if splits else refused[0]) and len(refused) == 1 == _counted(pair)
        assert all(lost or outcome == right for lost, outcome, right in zip(failed, outcomes, wanted, strict=True))
        again = [replace(request, id=RequestId(f"again {request.id}")) for request in requests]
        assert await _outcomes(pair, again) == wanted


async def test_a_score_without_memory_fails_and_the_next_one_does_not() -> None:
    model = vendored("tt_moe")
    tokens = tuple(range(4, 50))
    async with pair_of(model.context, model.denoiser, SETTINGS) as pair:
        with short(model.context, lambda *_: True), pytest.raises(Overloaded, match="context tower's device has no"):
            await pair.score(ScoreRequest(RequestId("a"), tokens, 1))
        assert len((await pair.score(ScoreRequest(RequestId("b"), tokens, 1))).log_probs) == 45


def test_halves_of_halves() -> None:
    runs: list[list[int]] = []
    failed: list[int] = []

    def run(rows: list[int]) -> list[int]:
        runs.append(rows)
        if len(rows) > 2 or 4 in rows:
            raise torch.OutOfMemoryError("none")
        return rows

    memory = ShortMemory("denoiser")
    assert memory.in_halves([1, 2, 3, 4, 5], run, lambda row, _: failed.append(row)) == [1, 2, 3, 5]
    assert failed == [4] and memory.times == 4
    assert runs == [[1, 2, 3, 4, 5], [1, 2], [3, 4, 5], [3], [4, 5], [4], [5]]


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="broken"):
        ShortMemory("context").tried(1, lambda: (_ for _ in ()).throw(RuntimeError("broken")))
