"""Answers that have to be what a grammar says: in `ar`, and the same tokens in `verified`, in `auto` and elsewhere.

What `diffusion` does for it is in `test_structured_diffusion.py`.
"""

import asyncio
import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any, cast

import jsonschema
import pytest
import torch

from tests.engine.arrangements import SETTINGS, split_pair
from tests.engine.decode import Decoded, collect
from tests.engine.test_determinism import DEMO, one_thread, towers_of
from twotower.constraints import Constraint
from twotower.core import DecodingParams, FinishReason, Mode, Request, RequestId
from twotower.decoding.margins import NEAR_TIE
from twotower.decoding.steering import Steering
from twotower.engine.context.compiling import Compiling
from twotower.engine.in_process import colocated_runner, pair_of
from twotower.engine.pair import Pair
from twotower.errors import InvalidRequest, NumericalError
from twotower.text.grammars import Grammars, TextMatcher
from twotower.text.tokenizer import load_tokenizer

__all__ = ["one_thread"]  # a fixture
SCHEMA = {
    "type": "object",
    "properties": {
        "number": {"type": "integer", "minimum": 0, "maximum": 9999},
        "kind": {"enum": ["roman", "words", "list"]},
        "right": {"type": "boolean"},
    },
    "required": ["number", "kind", "right"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
each_mode = pytest.mark.parametrize("mode", [Mode.AR, Mode.VERIFIED, Mode.DIFFUSION, Mode.MOCK_AR])
JSON = Constraint("json", json.dumps(SCHEMA))
REGEX = Constraint("regex", "[a-z]{4,8} [0-9]{2}")


@cache
def _prompt() -> tuple[int, ...]:
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer is not None
    return tuple(tokenizer.encode("roman: 3376\n"))


def _text(tokens: Sequence[int]) -> str:
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer is not None
    return tokenizer.decode(tokens)


def _request(name: str, constraint: Constraint, mode: Mode = Mode.AR, **given: Any) -> Request:
    params = DecodingParams(mode, 48, structured_outputs=constraint, **given)
    return Request(RequestId(name), _prompt(), params)


def _decoded(requests: Sequence[Request]) -> list[Decoded]:
    towers = towers_of("demo")

    async def run() -> list[Decoded]:
        async with pair_of(towers.context, towers.denoiser, SETTINGS, checkpoint=DEMO) as pair:
            return list(await asyncio.gather(*(collect(pair, request) for request in requests)))

    return asyncio.run(run())


def _same(got: Decoded, wanted: Decoded) -> None:
    """A difference needs a near-tie."""
    same = (got.token_ids, got.finish_reason) == (wanted.token_ids, wanted.finish_reason)
    assert same or min(cast(float, got.margin), cast(float, wanted.margin)) < NEAR_TIE, (got, wanted)


def test_the_answer_is_what_was_described_and_ends_where_it_is_whole() -> None:
    """Greedy and drawn, beside one that asks for nothing; without it the demo answers something else."""
    hot = [_request(f"hot {seed}", JSON, temperature=2.0, seed=seed) for seed in range(2)]
    plain = Request(RequestId("plain"), _prompt(), DecodingParams(Mode.AR, 48))
    constraints = [JSON, REGEX, Constraint("choice", '["yes", "no"]')]
    asked = [_request(f"{n}", constraint) for n, constraint in enumerate(constraints)]
    free, whole, matched, chosen, *drawn = _decoded([plain, *asked, *hot])
    for result in (whole, *drawn):
        jsonschema.validate(json.loads(_text(result.token_ids)), SCHEMA)
    assert re.fullmatch(REGEX.text, _text(matched.token_ids)) and _text(chosen.token_ids) in ("yes", "no")
    for result in (whole, matched, chosen, *drawn):
        assert result.finish_reason is FinishReason.STOP and result.token_ids[-1] == 2
    assert len({tuple(result.token_ids) for result in drawn}) > 1
    assert _text(free.token_ids).startswith("MMMCCCLXXVI")


@pytest.mark.parametrize("constraint", [REGEX, pytest.param(JSON, marks=pytest.mark.slow)])
def test_verified_and_auto_give_ars_tokens_and_so_does_one_that_goes_on(constraint: Constraint) -> None:
    """From cuts of the answer on, as a cell that takes over gets it: the committed tokens are followed again."""
    draw = random.Random(3)
    asked = [
        _request("greedy", constraint),
        _request("drawn", constraint, temperature=1.5, seed=5, frequency_penalty=0.5),
    ]
    again, wanted = list[Request](), list[Decoded]()
    for request, whole in zip(asked, _decoded(asked), strict=True):
        for mode in (Mode.AR, Mode.VERIFIED, Mode.AUTO):
            for cut in {0, draw.randrange(1, len(whole.token_ids)), len(whole.token_ids) - 1}:
                params = replace(request.params, mode=mode, draft_threshold=0.0, draft_steps=1)
                name = RequestId(f"{request.id} {mode} {cut}")
                again.append(replace(request, id=name, params=params, committed=tuple(whole.token_ids[:cut])))
                wanted.append(whole)
    for got, whole in zip(_decoded(again), wanted, strict=True):
        _same(got, whole)


def test_where_a_draft_cannot_be_followed_it_ends_and_the_tokens_are_ars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind one token of each draft no token may come, as where a bound is met there."""
    masks = TextMatcher.masks

    def met(self: TextMatcher, draft: Sequence[int], first: int, count: int) -> list[bytes]:
        return [
            mask if first + at < 2 else bytes(len(mask)) for at, mask in enumerate(masks(self, draft, first, count))
        ]

    numeral = Constraint("regex", "[A-Z]+")  # which is what the demo drafts, so drafts would stand
    asked = [_request("greedy", numeral), _request("drawn", numeral, temperature=0.5, seed=5)]
    wanted = _decoded(asked)
    monkeypatch.setattr(TextMatcher, "masks", met)
    given = {"draft_threshold": 0.0, "draft_steps": 1}
    drafted = [replace(one, params=replace(one.params, mode=Mode.VERIFIED, **given)) for one in asked]
    for got, whole in zip(_decoded(drafted), wanted, strict=True):
        _same(got, whole)


@pytest.mark.slow
def test_over_a_link() -> None:
    """The tower that decides compiles: the context tower where it verifies, else the denoiser."""
    towers = towers_of("demo")
    asked = [_request(f"{n}", constraint, Mode.VERIFIED) for n, constraint in enumerate((JSON, REGEX))]
    wanted = _decoded([replace(r, params=replace(r.params, mode=Mode.AR)) for r in asked])
    led = [_request(f"{mode}", JSON, mode) for mode in (Mode.DIFFUSION, Mode.MOCK_AR)]
    wanted, asked = wanted + _decoded(led), asked + led

    async def run() -> list[Decoded]:
        async with split_pair(towers, 2, checkpoint=DEMO) as pair:
            return list(await asyncio.gather(*(collect(pair, request) for request in asked)))

    for got, whole in zip(asyncio.run(run()), wanted, strict=True):
        _same(got, whole)


@each_mode
@pytest.mark.parametrize(
    ("constraint", "committed", "words"),
    [
        (Constraint("regex", "(a|b"), (), "structured_outputs: regex: .*unclosed group"),
        (REGEX, (300, 301, 302), "structured_outputs: cannot be continued: "),
        (Constraint("grammar", "start: start"), (), "structured_outputs: grammar: no token"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_followed_fails_alone_and_leaves_no_room_taken(
    mode: Mode, constraint: Constraint, committed: tuple[int, ...], words: str
) -> None:
    towers = towers_of("demo")

    async def run() -> None:
        async with pair_of(towers.context, towers.denoiser, SETTINGS, checkpoint=DEMO) as pair:
            other = asyncio.create_task(collect(pair, _request("good", REGEX, mode)))
            with pytest.raises(InvalidRequest, match=words):
                await collect(pair, replace(_request("bad", constraint, mode, block_size=3), committed=committed))
            assert re.fullmatch(REGEX.text, _text((await other).token_ids))
            await _nothing_is_held(pair)

    asyncio.run(run())


@each_mode
@pytest.mark.parametrize("healthy", [0, 3])
def test_a_nan_of_the_tower_is_not_told_as_the_requests_fault(
    mode: Mode, healthy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the prompt, and some forwards later."""
    towers, calls = towers_of("demo"), count()
    tower = towers.context if mode in (Mode.AR, Mode.VERIFIED) else towers.denoiser
    logits = tower.logits
    monkeypatch.setattr(tower, "logits", lambda h: logits(h) * (1 if next(calls) < healthy else torch.nan))

    async def run() -> None:
        async with pair_of(towers.context, towers.denoiser, SETTINGS, checkpoint=DEMO) as pair:
            with pytest.raises(NumericalError):
                await collect(pair, _request("r", REGEX, mode, confidence_threshold=1.0))
            await _nothing_is_held(pair)

    asyncio.run(run())


def test_a_process_that_gets_ready_reads_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first request: reading holds the whole process."""
    ready = list[Grammars]()
    monkeypatch.setattr(Grammars, "prepare", lambda self: ready.append(self))
    plain = replace(SETTINGS, capture="off")  # a process that records passes takes seconds
    runner = colocated_runner(towers_of("demo").context, None, plain, prepare=True, checkpoint=DEMO)
    runner.stop()
    assert len(ready) == 1


async def _nothing_is_held(pair: Pair) -> None:
    """Soon after: both towers say that they have let go."""
    async with asyncio.timeout(60):
        while pair.ledger.running or pair.ledger.waiting:
            await asyncio.sleep(0.001)


@each_mode
def test_an_engine_without_a_tokenizer_refuses_by_name(mode: Mode) -> None:
    towers = towers_of("demo")

    async def run() -> None:
        async with pair_of(towers.context, towers.denoiser, SETTINGS) as pair:
            with pytest.raises(
                InvalidRequest, match="structured_outputs: not served here: this engine has no tokenizer"
            ):
                await collect(pair, _request("r", REGEX, mode))
            await _nothing_is_held(pair)

    asyncio.run(run())


@each_mode
def test_one_that_is_given_up_while_its_grammar_is_compiled(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is decoded, and its place is free."""
    towers = towers_of("demo")
    monkeypatch.setattr(Compiling, "take", lambda self: None)  # never done

    async def run() -> None:
        async with pair_of(towers.context, towers.denoiser, SETTINGS, checkpoint=DEMO) as pair:
            task = asyncio.create_task(collect(pair, _request("r", REGEX, mode)))
            while pair.ledger.running == 0:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await _nothing_is_held(pair)

    asyncio.run(run())


def test_a_constraint_is_never_left_out() -> None:
    with pytest.raises(AssertionError):
        Steering(_request("r", REGEX).params, 2, ())
