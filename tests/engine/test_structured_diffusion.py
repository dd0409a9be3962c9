"""`diffusion` under a grammar: every answer is what it says, in so many steps; a grammar of every text changes nothing.

First with a made-up denoiser and tiny languages, then with the demo's towers and llguidance.
"""

import asyncio
import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.decoding.languages import EOS, Anything, Language
from tests.engine.arrangements import SETTINGS
from tests.engine.decode import Decoded, collect
from tests.engine.test_determinism import DEMO, one_thread, towers_of
from tests.engine.test_structured import JSON, REGEX, SCHEMA, _decoded, _nothing_is_held, _request, _same, _text
from twotower.constraints import Constraint
from twotower.core import BlockEvent, DecodingParams, FinishReason, Floor, Mode, Request, RequestId, StepEvent
from twotower.decoding.certain_prefix import CertainPrefix
from twotower.decoding.steering import Matcher
from twotower.decoding.unmasking import Blocks, unmask
from twotower.engine.answer import Answer
from twotower.engine.in_process import pair_of
from twotower.engine.modes.diffusion import Diffusion
from twotower.engine.modes.strategy import LedSequence
from twotower.engine.pair import Pair
from twotower.engine.passes import Passes
from twotower.engine.steps import take_all
from twotower.errors import InvalidRequest
from twotower.text.grammars import TextMatcher

__all__ = ["one_thread"]  # a fixture
VOCAB = 12


class Guesses:
    """A denoiser whose logits follow from the slot, and from what the block holds."""

    def __init__(self, sharp: float) -> None:
        self._sharp = sharp

    def step(self, slots: Sequence[int], blocks: Blocks) -> Tensor:
        logits = torch.zeros(len(slots), blocks.width, VOCAB)
        for row, (slot, tokens) in enumerate(zip(slots, blocks.tokens, strict=True)):
            draw = torch.Generator().manual_seed(hash((slot, *tokens)) % 2**31)
            logits[row, : len(tokens)] = torch.randn(len(tokens), VOCAB, generator=draw) * self._sharp
        return unmask(logits, blocks)


def _sequence(mode: Diffusion, number: int, params: DecodingParams, matcher: Matcher | None) -> LedSequence:
    answer = Answer.begun(Request(RequestId(str(number)), (5,), params), EOS)
    sequence = LedSequence(answer, number, mode, slot=number)
    if matcher is not None:
        sequence.certain = CertainPrefix(matcher, answer.stopping, ())
    mode.open(sequence)
    return sequence


def _answers(sharp: float, asked: dict[int, tuple[DecodingParams, Matcher | None]]) -> dict[int, Decoded]:
    """All of them at once, by number."""
    mode = Diffusion(cast(Passes, Guesses(sharp)), None)
    running = [_sequence(mode, number, *each) for number, each in asked.items()]
    answers = {sequence.number: Decoded() for sequence in running}
    while running:
        for turns in take_all(mode.launch(running)):
            for sequence, turn in turns:
                params = sequence.request.params
                if not turn.tokens:
                    assert sequence.step < params.steps_per_block + params.block_size - 1
                    continue
                assert turn.cost.num_steps < params.steps_per_block + params.block_size
                event = sequence.answer.extend(turn.tokens, turn.cost)
                answers[sequence.number].add(event)
                if event.is_last:
                    running = [other for other in running if other is not sequence]
    return answers


@st.composite
def _params(draw: st.DrawFn) -> DecodingParams:
    return DecodingParams(
        Mode.DIFFUSION,
        draw(st.integers(1, 20)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from([1, 2, 5, 9])),
        draw(st.sampled_from([0.0, 0.3, 0.8, 1.0])),
        draw(st.sampled_from([0.0, 0.0, 0.7, 1000.0])),
        seed=draw(st.integers(0, 2**53)),
    )


_words = st.lists(st.lists(st.integers(4, VOCAB - 1), max_size=12).map(tuple), min_size=1, max_size=6)
_sharp = st.sampled_from([0.5, 4.0, 20.0])


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=150)
@given(_sharp, st.lists(st.tuples(_params(), _words), min_size=1, max_size=3))
def test_every_answer_is_a_word_whatever_the_denoiser_thinks(
    sharp: float, asked: list[tuple[DecodingParams, list[tuple[int, ...]]]]
) -> None:
    """And no other than without the others in the batch."""
    free = {len(asked): (asked[0][0], cast(Matcher | None, None))}

    def kept() -> dict[int, tuple[DecodingParams, Matcher | None]]:
        return {number: (params, Language(words)) for number, (params, words) in enumerate(asked)}

    together = _answers(sharp, {**kept(), **free})
    for number, (params, words) in enumerate(asked):
        got = together[number]
        texts = [(*word, EOS) for word in words]
        if got.finish_reason is FinishReason.STOP:
            assert tuple(got.token_ids) in texts
        else:
            assert len(got.token_ids) == params.max_new_tokens
            assert any(text[: len(got.token_ids)] == tuple(got.token_ids) for text in texts)
        assert got == _answers(sharp, {number: kept()[number]})[number]
    assert together[len(asked)] == _answers(sharp, free)[len(asked)]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(_sharp, _params())
def test_a_grammar_of_every_text_changes_no_token_and_no_step(sharp: float, params: DecodingParams) -> None:
    assert _answers(sharp, {0: (params, Anything())}) == _answers(sharp, {0: (params, None)})


def _asked(draw: random.Random, number: int) -> Request:
    """A schema of the demo's size, drawn; a prompt that asks for something else."""
    kinds: list[dict[str, Any]] = [
        {"type": "integer", "minimum": 0, "maximum": 99},
        {"enum": ["roman", "words", "x"]},
        {"type": "boolean"},
        {"type": "string", "pattern": "^[a-f]{1,4}$"},
        {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2},
    ]
    names = draw.sample(["a", "b2", "key"], draw.randint(1, 2))
    schema = {
        "type": "object",
        "properties": {name: draw.choice(kinds) for name in names},
        "required": names,
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    params = DecodingParams(
        Mode.DIFFUSION,
        64,
        draw.choice([5, 16, 16]),
        draw.choice([2, 16]),
        draw.choice([0.0, 0.5, 0.8, 1.0]),
        draw.choice([0.0, 0.0, 1.0]),
        seed=number,
        structured_outputs=Constraint("json", json.dumps(schema)),
    )
    prompt = tuple(draw.randrange(5, 250) for _ in range(draw.randint(2, 12)))
    return Request(RequestId(f"{number}"), prompt, params)


@pytest.mark.parametrize("number", [pytest.param(12, id="few"), pytest.param(200, marks=pytest.mark.slow, id="many")])
def test_every_answer_of_the_demo_is_valid(number: int) -> None:
    draw = random.Random(number)
    asked = [_asked(draw, each) for each in range(number)]
    for request, got in zip(asked, _decoded(asked), strict=True):
        params = request.params
        assert params.structured_outputs is not None and got.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(_text(got.token_ids)), json.loads(params.structured_outputs.text))
        assert got.num_steps < got.num_blocks * (params.steps_per_block + params.block_size)


def test_a_grammar_of_every_text_leaves_the_demos_answers() -> None:
    every = Constraint("regex", "(.|\\n)*")
    asked = [_request(f"{t}", every, Mode.DIFFUSION, temperature=t, seed=4) for t in (0.0, 0.3)]
    free = [replace(r, id=RequestId(f"free {r.id}"), params=replace(r.params, structured_outputs=None)) for r in asked]
    got = _decoded([*asked, *free])
    for kept, plain in zip(got[:2], got[2:], strict=True):
        _same(kept, plain)


def test_one_that_goes_on_elsewhere_gives_the_same_tokens_and_so_it_does_alone() -> None:
    request = _request("r", JSON, Mode.DIFFUSION, block_size=8, temperature=0.7, seed=3)
    [whole] = _decoded([request])
    jsonschema.validate(json.loads(_text(whole.token_ids)), SCHEMA)
    cuts = range(0, len(whole.token_ids), 8)
    parts = [replace(request, id=RequestId(f"{cut}"), committed=tuple(whole.token_ids[:cut])) for cut in cuts]
    for got in _decoded(parts):
        _same(got, whole)


def test_auto_decodes_by_it_where_its_floor_allows() -> None:
    request = _request("r", REGEX, Mode.AUTO, floor=Floor.CONFIDENCE)
    [got] = _decoded([request])
    assert re.fullmatch(REGEX.text, _text(got.token_ids))


def _told(request: Request) -> list[object]:
    towers = towers_of("demo")

    async def run() -> list[object]:
        async with pair_of(towers.context, towers.denoiser, SETTINGS, checkpoint=DEMO) as pair:
            return [event async for event in pair.events(request, timeout_s=60)]

    return asyncio.run(run())


def test_of_a_position_that_is_fixed_again_the_trace_tells_both() -> None:
    """The last one stands. A likelihood's confidence is that one's."""
    request = replace(_request("r", REGEX, Mode.DIFFUSION, confidence_threshold=0.0), trace=True, logprobs=0)
    fixed, times = dict[int, tuple[int, float]](), list[int]()
    for event in _told(request):
        if isinstance(event, StepEvent):
            times += event.positions
            told = zip(event.positions, event.token_ids, event.confidence, strict=True)
            fixed |= {position: (token, sure) for position, token, sure in told}
        elif isinstance(event, BlockEvent):
            sure = [one.confidence for one in event.likelihoods]
            places = range(event.start, event.start + len(event.token_ids))
            assert list(zip(event.token_ids, sure, strict=True)) == [fixed[place] for place in places]
    assert len(times) > len(set(times)), "γ 0 fixes the whole block at once, and the demo's answer is no match"


DEAD_END = "structured_outputs: cannot be continued: no token"


def _dead_end_behind(monkeypatch: pytest.MonkeyPatch, masks: int) -> None:
    """So many masks have tokens in them, of each answer; the next one has none."""
    worked_out, made = TextMatcher.masks, dict[TextMatcher, int]()

    def none_any_more(self: TextMatcher, draft: Sequence[int], first: int, wanted: int) -> list[bytes]:
        made[self] = made.get(self, 0) + 1
        if made[self] > masks:
            self._mask = self._nothing
        return worked_out(self, draft, first, wanted)

    monkeypatch.setattr(TextMatcher, "masks", none_any_more)


def test_a_dead_end_is_told_as_in_ar(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was whole before has been told."""
    _dead_end_behind(monkeypatch, 6)
    towers = towers_of("demo")

    async def run() -> list[int]:
        tokens = list[int]()
        async with pair_of(towers.context, towers.denoiser, SETTINGS, checkpoint=DEMO) as pair:
            request = _request("r", JSON, Mode.DIFFUSION, block_size=4)
            with pytest.raises(InvalidRequest, match=DEAD_END):
                async for event in pair.events(request, timeout_s=60):
                    tokens += event.token_ids if isinstance(event, BlockEvent) else ()
            with pytest.raises(InvalidRequest, match=DEAD_END):
                await collect(pair, _request("s", JSON, Mode.AR))
        return tokens

    assert len(asyncio.run(run())) == 4


def _tokens_of(events: list[BlockEvent]) -> list[int]:
    """However many came at a time."""
    return [token for event in events for token in event.token_ids]


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.MOCK_AR])
@pytest.mark.parametrize("masks", [4, 5, 6])
@pytest.mark.slow
def test_before_a_dead_end_likelihoods_are_told_of_all_that_was_whole(
    mode: Mode, masks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a block, and within one. They come later than the tokens alone would."""
    _dead_end_behind(monkeypatch, masks)
    towers = towers_of("demo")

    async def told(pair: Pair, logprobs: int | None) -> list[BlockEvent]:
        events = list[BlockEvent]()
        request = replace(_request(f"r{logprobs}", JSON, mode, block_size=4), logprobs=logprobs)
        with pytest.raises(InvalidRequest, match=DEAD_END):
            async for event in pair.events(request, timeout_s=60):
                events += [event] if isinstance(event, BlockEvent) else []
        return events

    async def run() -> tuple[list[BlockEvent], list[BlockEvent]]:
        async with pair_of(towers.context, towers.denoiser, SETTINGS, checkpoint=DEMO) as pair:
            both = await told(pair, None), await told(pair, 0)
            await _nothing_is_held(pair)
            return both

    plain, rated = asyncio.run(run())
    assert _tokens_of(rated) == _tokens_of(plain) != []
    assert all(len(event.likelihoods) == len(event.token_ids) for event in rated)
