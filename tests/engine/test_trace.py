"""The trace of a request: what the denoiser's steps did, told between its blocks, and nothing where it is not asked."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.decode import SETTINGS
from tests.engine.test_golden import _cases
from tests.goldens import diffusion_request, golden, prompt_ids, the_first_is_quick
from twotower.core import BlockEvent, DecodingParams, Mode, Request, RequestId, RoundEvent, StepEvent, ToldEvent
from twotower.engine.in_process import pair_of
from twotower.engine.modes.block_steps import StepTrace

PROMPTS = pytest.mark.parametrize(("name", "number"), the_first_is_quick(prompt_ids()))


def told(name: str, requests: Sequence[Request], traces: list[StepTrace] | None = None) -> list[list[ToldEvent]]:
    """What a pair tells of each of them, all decoded at once."""
    model = golden(name)

    async def run() -> list[list[ToldEvent]]:
        seen = traces.append if traces is not None else None
        async with pair_of(model.context, model.denoiser, SETTINGS, seen) as pair:

            async def of(request: Request) -> list[ToldEvent]:
                return [event async for event in pair.events(request, timeout_s=60)]

            return list(await asyncio.gather(*map(of, requests)))

    return asyncio.run(run())


@PROMPTS
def test_in_diffusion_it_is_what_the_steps_saw(name: str, number: int) -> None:
    """The golden tests compare what the steps saw with the released code."""
    prompt = golden(name).prompts[number]
    requests = [replace(diffusion_request(prompt, case), trace=True) for case in _cases(prompt)]
    seen: list[StepTrace] = []
    for request, events in zip(requests, told(name, requests, seen), strict=True):
        size = request.params.block_size
        steps = [event for event in events if isinstance(event, StepEvent)]
        assert steps == [
            StepEvent(
                request.id,
                step.block * size,
                size,
                step.step,
                tuple(step.block * size + place for place in step.committed),
                tuple(step.predicted[place] for place in step.committed),
                tuple(step.confidence[place] for place in step.committed),
            )
            for step in seen
            if step.request_id == request.id
        ]
        _each_block_is_what_its_steps_fixed(events)


def _each_block_is_what_its_steps_fixed(events: Sequence[ToldEvent]) -> None:
    fixed: dict[int, int] = {}
    for event in events:
        if isinstance(event, StepEvent):
            assert not fixed.keys() & set(event.positions), "a position is fixed once"
            fixed |= zip(event.positions, event.token_ids, strict=True)
        else:
            assert isinstance(event, BlockEvent)
            assert event.token_ids == tuple(fixed[event.start + place] for place in range(len(event.token_ids)))


def _verified(prompt: dict[str, Any], **params: Any) -> Request:
    values = {"max_new_tokens": 40, "draft_threshold": 0.3, "ignore_eos": True, **params}
    return Request(RequestId("r"), tuple(prompt["tokens"]), DecodingParams(Mode.VERIFIED, **values), trace=True)


@PROMPTS
def test_in_verified_it_is_the_draft_and_the_verdict(name: str, number: int) -> None:
    model = golden(name)
    [events] = told(name, [_verified(model.prompts[number], draft_steps=3)])
    draft, verdict, drafted, accepted = dict[int, int](), None, 0, 0
    for event in events:
        if isinstance(event, StepEvent):
            assert event.size == 15 and min(event.positions) >= event.start
            draft |= zip(event.positions, event.token_ids, strict=True)
        elif isinstance(event, RoundEvent):
            verdict, drafted = event, drafted + len(event.draft)
            assert event.draft == tuple(draft[event.start + place] for place in range(len(event.draft)))
            draft = {}
        else:
            assert isinstance(event, BlockEvent)
            assert (verdict is None) == (event.num_blocks == 0), "the first token is of no round"
            if verdict is not None:
                stands = verdict.draft[: verdict.num_accepted]
                assert verdict.start == event.start and (*stands, verdict.token_id) == event.token_ids
                assert verdict.draft[verdict.num_accepted :][:1] != (verdict.token_id,), "it was rejected"
                accepted += event.num_accepted
            verdict = None
    assert drafted > accepted >= 0


def test_it_changes_no_token_and_is_told_of_nobody_else() -> None:
    prompt = golden("tt_dense").prompts[0]
    plain = [replace(_verified(prompt), id=RequestId("v"), trace=False)]
    plain += [diffusion_request(prompt, case) for case in _cases(prompt)]
    traced = [replace(request, id=RequestId(f"{request.id}!"), trace=True) for request in plain]
    answers = told("tt_dense", [*plain, *traced])
    for bare, shown in zip(answers[: len(plain)], answers[len(plain) :], strict=True):
        assert all(isinstance(event, BlockEvent) for event in bare)
        blocks = [event for event in shown if isinstance(event, BlockEvent)]
        assert len(blocks) < len(shown)
        assert [replace(block, request_id=bare[0].request_id, margin=None) for block in blocks] == [
            replace(block, margin=None) for block in bare if isinstance(block, BlockEvent)
        ]


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.VERIFIED])
def test_one_that_goes_on_elsewhere_counts_on(mode: Mode) -> None:
    """Indices are among the new tokens of the whole request, wherever it began."""
    prompt = golden("tt_dense").prompts[0]
    params = DecodingParams(mode, max_new_tokens=40, block_size=8, ignore_eos=True)
    whole = Request(RequestId("a"), tuple(prompt["tokens"]), params, trace=True)
    [first] = told("tt_dense", [whole])
    tokens = [token for event in first if isinstance(event, BlockEvent) for token in event.token_ids]
    [rest] = told("tt_dense", [replace(whole, committed=tuple(tokens[:16]))])
    starts = [event.start for event in rest if isinstance(event, StepEvent)]
    assert starts[0] == (16 if mode is Mode.DIFFUSION else 17) and starts == sorted(starts)
    if mode is Mode.DIFFUSION:
        ends = [event for event in first if isinstance(event, StepEvent) and event.start >= 16]
        again = [event for event in rest if isinstance(event, StepEvent)]
        assert [replace(event, confidence=()) for event in again] == [replace(event, confidence=()) for event in ends]
