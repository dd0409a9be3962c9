"""`verified` gives `ar`'s tokens: those of the released code, and of any request, whatever its drafts are worth."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch

from tests.engine.arrangements import ARRANGEMENTS, LINK, ByHand, alone, split_pair
from tests.engine.decode import SETTINGS, Decoded, collect, decode_all
from tests.engine.test_determinism import CHECKPOINTS, one_thread, prompt_for, towers_of
from tests.goldens import golden, prompt_ids, the_first_is_quick
from twotower.core import BlockEvent, DecodingParams, FailureEvent, FinishReason, Mode, Request, RequestId
from twotower.decoding.margins import NEAR_TIE
from twotower.engine.answer import Cost
from twotower.engine.modes.drafting import Drafting
from twotower.engine.modes.strategy import LedSequence, Turn, Turns
from twotower.engine.modes.verified import Verified, _turn
from twotower.engine.steps import Step
from twotower.errors import NumericalError

REQUESTS = 8
__all__ = ["one_thread"]  # a fixture


def _verified(prompt: Sequence[int], new: int, name: str = "r", **params: Any) -> Request:
    return Request(RequestId(name), tuple(prompt), DecodingParams(Mode.VERIFIED, max_new_tokens=new, **params))


def _as_ar(request: Request) -> Request:
    params = request.params
    given = {"temperature", "top_k", "top_p", "seed", "stop_token_ids", "ignore_eos", "max_new_tokens"}
    return replace(request, params=DecodingParams(Mode.AR, **{name: getattr(params, name) for name in given}))


def _same(request: Request, got: Decoded, wanted: Decoded) -> bool:
    """Whether they are equal; a difference needs a near-tie."""
    assert got.margin is not None and wanted.margin is not None
    same = (got.token_ids, got.finish_reason) == (wanted.token_ids, wanted.finish_reason)
    assert same or min(got.margin, wanted.margin) < NEAR_TIE, (request, got, wanted)
    return same


def _any_request(number: int, draw: random.Random, prompt: Sequence[int]) -> Request:
    return _verified(
        prompt,
        draw.choice([1, 2, 7, 16, 33]),
        str(number),
        block_size=draw.choice([1, 2, 3, 8, 16, 16, 40]),
        draft_steps=draw.choice([1, 2, 2, 3, 40]),
        draft_threshold=draw.choice([0.0, 0.3, 0.6, 1.0]),
        temperature=draw.choice([0.0, 0.0, 0.3, 1.0]),
        top_k=draw.choice([0, 0, 5]),
        top_p=draw.choice([1.0, 1.0, 0.8]),
        seed=draw.randrange(2**53),
        ignore_eos=draw.random() < 0.5,
    )


@pytest.mark.parametrize(("name", "number"), the_first_is_quick(prompt_ids()))
def test_the_released_codes_ar_tokens(name: str, number: int) -> None:
    model = golden(name)
    prompt = model.prompts[number]
    wanted = prompt["ar"]["tokens"]
    sizes = (1, 4, 16, 40)
    requests = [_verified(prompt["tokens"], len(wanted), str(n), block_size=n, ignore_eos=True) for n in sizes]
    for result in decode_all(model.context, model.denoiser, requests):
        assert result.token_ids == wanted and result.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("name", "number"), prompt_ids(lambda prompt: "eos" in prompt["ar"]))
def test_the_released_codes_eos(name: str, number: int) -> None:
    model = golden(name)
    prompt = model.prompts[number]
    eos = prompt["ar"]["eos"]
    request = _verified(prompt["tokens"], 32, stop_token_ids=(eos["eos_token_id"],), ignore_eos=True)
    [result] = decode_all(model.context, model.denoiser, [request])
    assert result.token_ids == eos["tokens"] and result.finish_reason is FinishReason.STOP


@pytest.mark.slow
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_any_request_in_company_has_ars_tokens(name: str, arrangement: str) -> None:
    towers, draw = towers_of(name), random.Random(f"{name} {arrangement}")
    requests = [_any_request(number, draw, prompt_for(towers, draw)) for number in range(REQUESTS)]
    wanted = alone(towers, [_as_ar(request) for request in requests])
    got = ARRANGEMENTS[arrangement](towers, requests, draw)
    assert sum(_same(r, got[r.id], wanted[r.id]) for r in requests) >= REQUESTS - 1


@pytest.mark.parametrize("wire", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["tt_dense", pytest.param("tt_moe", marks=pytest.mark.slow)])
async def test_states_rounded_on_the_wire_change_drafts_alone(name: str, wire: str) -> None:
    """Tokens are `ar`'s, also of a request that was begun elsewhere."""
    towers, draw = towers_of(name), random.Random(f"{name} {wire}")
    requests = [_any_request(number, draw, prompt_for(towers, draw)) for number in range(REQUESTS)]
    wanted = alone(towers, [_as_ar(request) for request in requests])
    asked = {}
    for request in requests:
        known = wanted[request.id].token_ids
        begun = replace(request, committed=tuple(known[: draw.randrange(len(known))]))
        asked |= {f"{each.id} {n}": each for n, each in enumerate([request, begun, _as_ar(begun)])}
    async with split_pair(towers, 1, told=replace(LINK, ssm_wire_dtype=wire)) as pair:
        again = [collect(pair, replace(each, id=RequestId(named))) for named, each in asked.items()]
        got = dict(zip(asked, await asyncio.gather(*again), strict=True))
    assert sum(not _same(each, got[named], wanted[each.id]) for named, each in asked.items()) <= 1


class Always(Drafting):
    """Drafts whatever came of it."""

    def alone(self, room: int) -> int:
        return 0


class Oracle(Verified):
    """Drafts what the context tower is going to say, but for some places, and sometimes with an end that is none."""

    def __init__(self, answers: dict[RequestId, list[int]], draw: random.Random, right: float) -> None:
        self.answers, self.draw, self.right = answers, draw, right

    def open(self, sequence: LedSequence) -> None:
        sequence.drafting = Always()

    def launch(self, sequences: list[LedSequence]) -> list[Step[Turns]]:
        return [Step(torch.zeros(len(sequences), 1), lambda _: [(s, self._drafted(s)) for s in sequences])]

    def _drafted(self, sequence: LedSequence) -> Turn:
        answer, size = self.answers[sequence.request.id], len(sequence.tokens)
        known = answer[sequence.answer.generated - 1 :][:size]
        assert known[0] == sequence.tokens[0], "a block begins with the token that was decided last"
        known += [5] * (size - len(known))
        draft = [token if self.draw.random() < self.right else self.draw.choice([2, 6, 7, 8]) for token in known[1:]]
        sequence.tokens, sequence.masked = [known[0], *draft], [False] * size
        sequence.step += 1
        return _turn(sequence, cast(Any, None))


def _counted(pair: ByHand, requests: Sequence[Request], draw: random.Random) -> list[tuple[int, int, int, int]]:
    """Decodes, and returns of every request: rounds, drafted, accepted, tokens."""
    counts = {request.id: [0, 0, 0, 0] for request in requests}
    take = pair._take

    def counting(results: dict[RequestId, Decoded]) -> int:
        for event in pair.events:
            if isinstance(event, BlockEvent):
                told = (event.num_blocks, event.num_drafted, event.num_accepted, len(event.token_ids))
                counts[event.request_id] = [a + b for a, b in zip(counts[event.request_id], told, strict=True)]
        return take(results)

    pair._take = counting  # type: ignore[method-assign]
    pair.results = pair.decode(requests, draw)  # type: ignore[attr-defined]
    return [cast(tuple[int, int, int, int], tuple(counts[request.id])) for request in requests]


@pytest.mark.parametrize("right", [0.0, pytest.param(0.7, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("name", ["tt_dense", pytest.param("tt_moe", marks=pytest.mark.slow)])
def test_whatever_was_drafted_the_tokens_are_ars(name: str, right: float) -> None:
    """The cut falls everywhere in a block, and the states go on from it."""
    towers, draw = towers_of(name), random.Random(f"{name} {right}")
    requests = [_any_request(number, draw, prompt_for(towers, draw)) for number in range(REQUESTS)]
    wanted = alone(towers, [_as_ar(request) for request in requests])
    pair = ByHand(towers)
    answers = {request.id: wanted[request.id].token_ids for request in requests}
    pair.denoisers[0]._modes[Mode.VERIFIED] = Oracle(answers, draw, right)
    counts = _counted(pair, requests, draw)
    results = pair.results  # type: ignore[attr-defined]
    for request, (rounds, drafted, accepted, tokens) in zip(requests, counts, strict=True):
        assert _same(request, results[request.id], wanted[request.id])
        assert tokens == len(wanted[request.id].token_ids) and accepted <= drafted
        # The prompt gives a token, a round its accepted ones and one more; what follows an end is cut off.
        assert 1 + accepted + rounds >= tokens
        if right == 1.0:
            assert accepted == drafted and rounds == -(-(tokens - 1) // request.params.block_size)
        if request.params.stop_token_ids == () and request.params.ignore_eos:
            assert 1 + accepted + rounds == tokens


@pytest.mark.parametrize(("right", "passes"), [(0.0, 1.25), (1.0, 0.2)])
@pytest.mark.slow
def test_drafts_that_do_not_pay_are_left_out(right: float, passes: float) -> None:
    """Then a token costs about a pass, as in `ar`, and it is the same token."""
    towers, draw = towers_of("tt_dense"), random.Random("drafts")
    request = _verified([5, 6, 7], 120, ignore_eos=True, draft_steps=1)
    wanted = alone(towers, [_as_ar(request)])[request.id].token_ids
    pair = ByHand(towers)
    oracle = Oracle({request.id: wanted}, draw, right)
    oracle.open = lambda sequence: None  # type: ignore[method-assign]  # it drafts while that pays
    pair.denoisers[0]._modes[Mode.VERIFIED] = oracle
    [(rounds, drafted, accepted, _)] = _counted(pair, [request], draw)
    assert pair.results[request.id].token_ids == wanted  # type: ignore[attr-defined]
    drafts = -(-drafted // 15)
    assert (rounds + drafts) / len(wanted) < passes
    assert drafts >= 7, "it is tried again"
    assert accepted == (drafted if right else 0)


def test_no_more_is_read_than_the_answer_may_take() -> None:
    """An answer that fills its room to the last page, with drafts that would reach beyond."""
    model = golden("tt_moe")
    request = _verified([5, 6, 7, 8], 29, block_size=40, ignore_eos=True)
    assert request.positions == 32 == _as_ar(request).positions
    tight = replace(SETTINGS, max_sequences=1, cache_tokens=32, max_sequence_length=64)
    [got] = decode_all(model.context, model.denoiser, [request], settings=tight)
    [wanted] = decode_all(model.context, model.denoiser, [_as_ar(request)])
    assert got.token_ids == wanted.token_ids and len(got.token_ids) == 29


def _sequence(params: DecodingParams, tokens: list[int], masked: list[bool]) -> LedSequence:
    from twotower.engine.answer import Answer

    answer = Answer.begun(Request(RequestId("r"), (5,), params), eos_token_id=2)
    answer.generated = 1
    sequence = LedSequence(answer, 0, cast(Any, None))
    sequence.tokens, sequence.masked, sequence.step = tokens, masked, 1
    return sequence


@pytest.mark.parametrize(
    ("tokens", "masked", "commit"),
    [
        ([9, 8, 7, 6], [0, 0, 0, 0], (9, 8, 7, 6)),
        ([9, 8, 3, 6], [0, 0, 1, 0], ()),
        ([9, 8, 2, 3], [0, 0, 0, 1], (9, 8)),  # behind an end nothing has to be drafted, nor the end be read
        ([9, 2, 3, 3], [0, 0, 1, 1], (9,)),
        ([9, 3, 2, 3], [0, 1, 0, 1], ()),
    ],
)
def test_a_draft_is_over_where_the_answer_would_be(tokens: list[int], masked: list[int], commit: Sequence[int]) -> None:
    sequence = _sequence(DecodingParams(Mode.VERIFIED, max_new_tokens=20), tokens, list(map(bool, masked)))
    assert tuple(_turn(sequence, cast(Any, None)).commit) == commit
    assert sequence.drafted == max(0, len(commit) - 1)


def test_a_draft_is_no_longer_than_the_answer() -> None:
    sequence = _sequence(DecodingParams(Mode.VERIFIED, max_new_tokens=3), [9, 8, 7, 6], [False, False, False, True])
    assert tuple(_turn(sequence, cast(Any, None)).commit) == (9, 8)


def _sick(logits: Callable[[torch.Tensor], torch.Tensor], after: int) -> Callable[[torch.Tensor], torch.Tensor]:
    left = [after]

    def sick(hidden: torch.Tensor) -> torch.Tensor:
        out = logits(hidden)
        left[0] -= 1
        return out if left[0] >= 0 else torch.full_like(out, torch.nan)

    return sick


@pytest.mark.parametrize(("tower", "after"), [("context", 0), ("context", 1), ("denoiser", 0)])
def test_logits_that_are_not_finite_fail_the_request(tower: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    towers = towers_of("tt_dense")
    monkeypatch.setattr(getattr(towers, tower), "logits", _sick(getattr(towers, tower).logits, after))
    pair, errors = ByHand(towers), []
    pair.denoisers[0].add(_verified([5, 6], 20, ignore_eos=True))
    with torch.inference_mode():
        for _ in range(30):
            pair.context.tick(), pair.denoisers[0].tick()
            errors += [event.error for event in pair.events if isinstance(event, FailureEvent)]
            pair.events.clear()
    assert len(errors) == 1 and isinstance(errors[0], NumericalError) and tower in str(errors[0])
    assert pair.context.cache.room.free_slots == pair.context.cache.room.slots


def test_costs_follow_the_tokens() -> None:
    first = BlockEvent(RequestId("r"), 0, (5,), 0, 0)
    told = BlockEvent(RequestId("r"), 1, (6, 7, 8), 2, 1, FinishReason.STOP, 0.5, num_drafted=4, num_accepted=2)
    assert first.joined(told) == replace(told, start=0, token_ids=(5, 6, 7, 8))
    assert told.first(2) == replace(told, token_ids=(6, 7))
    assert told.after(2) == replace(
        told, start=3, token_ids=(8,), num_steps=0, num_blocks=0, num_drafted=0, num_accepted=0
    )
    assert Cost() == (0, 1, 0, 0, 0, 0)
    assert partial(told.first, 0)().num_drafted == 0
