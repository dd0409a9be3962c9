"""`auto` gives `ar`'s tokens, however it comes by them; with a floor of confidence, those of `diffusion` or `ar`'s."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.arrangements import ARRANGEMENTS, ByHand, alone
from tests.engine.decode import decode_all
from tests.engine.test_determinism import CHECKPOINTS, one_thread, prompt_for, towers_of
from tests.engine.test_verified import _any_request, _as_ar, _same
from tests.goldens import MODELS, golden, prompt_ids, the_first_is_quick
from twotower.core import BlockEvent, DecodingParams, Event, FailureEvent, FinishReason, Floor, Mode, Request, RequestId
from twotower.engine.meter import Meter, Pass
from twotower.engine.modes.auto import Auto, Weighed
from twotower.errors import NumericalError

REQUESTS = 8
NAMES = pytest.mark.parametrize("name", MODELS)
__all__ = ["one_thread"]  # a fixture


def _auto(prompt: Sequence[int], new: int, name: str = "r", **params: Any) -> Request:
    return Request(RequestId(name), tuple(prompt), DecodingParams(Mode.AUTO, max_new_tokens=new, **params))


class Drawn(Auto):
    """Chooses by lot: every change between two blocks is one that a load may bring."""

    draw: random.Random

    def alone(self, params: object, own: object, size: int) -> int:
        return self.draw.choice([0, 0, size, 1])


def _by_lot(pair: ByHand, draw: random.Random) -> ByHand:
    for engine in pair.denoisers:
        engine._auto = Drawn(engine._meter, engine.link.apart)
        engine._auto.draw = draw
    return pair


@pytest.mark.parametrize(("name", "number"), the_first_is_quick(prompt_ids()))
def test_the_released_codes_ar_tokens(name: str, number: int) -> None:
    model = golden(name)
    prompt = model.prompts[number]
    wanted = prompt["ar"]["tokens"]
    sizes = (1, 4, 16, 40)
    requests = [_auto(prompt["tokens"], len(wanted), str(n), block_size=n, ignore_eos=True) for n in sizes]
    for result in decode_all(model.context, model.denoiser, requests):
        assert result.token_ids == wanted and result.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("name", "number"), prompt_ids(lambda prompt: "eos" in prompt["ar"]))
def test_the_released_codes_eos(name: str, number: int) -> None:
    model = golden(name)
    prompt = model.prompts[number]
    eos = prompt["ar"]["eos"]
    request = _auto(prompt["tokens"], 32, stop_token_ids=(eos["eos_token_id"],), ignore_eos=True)
    pair = _by_lot(ByHand(towers_of(name)), random.Random(number))
    result = pair.decode([request], random.Random(number))[request.id]
    assert result.token_ids == eos["tokens"] and result.finish_reason is FinishReason.STOP


def _requests(name: str, draw: random.Random) -> list[Request]:
    towers = towers_of(name)
    some = [_any_request(number, draw, prompt_for(towers, draw)) for number in range(REQUESTS)]
    return [replace(request, params=replace(request.params, mode=Mode.AUTO)) for request in some]


@pytest.mark.parametrize("name", ["tt_dense", pytest.param("tt_moe", marks=pytest.mark.slow)])
def test_whatever_is_chosen_the_tokens_are_ars(name: str) -> None:
    """Sampled ones, too; of company the same, and from where a first cell left off."""
    towers, draw = towers_of(name), random.Random(name)
    requests = _requests(name, draw)
    wanted = alone(towers, [_as_ar(request) for request in requests])
    got = _by_lot(ByHand(towers, 2), draw).decode(requests, draw)
    assert sum(_same(r, got[r.id], wanted[r.id]) for r in requests) >= REQUESTS - 1
    cut = [(r, draw.randrange(len(wanted[r.id].token_ids))) for r in requests]
    again = [replace(r, committed=tuple(wanted[r.id].token_ids[:at])) for r, at in cut]
    resumed = _by_lot(ByHand(towers), draw).decode(again, draw)
    assert sum(_same(r, resumed[r.id], wanted[r.id]) for r in requests) >= REQUESTS - 1


@pytest.mark.slow
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_any_request_in_company_has_ars_tokens(name: str, arrangement: str) -> None:
    towers, draw = towers_of(name), random.Random(f"{name} {arrangement}")
    requests = _requests(name, draw)
    wanted = alone(towers, [_as_ar(request) for request in requests])
    got = ARRANGEMENTS[arrangement](towers, requests, draw)
    assert sum(_same(r, got[r.id], wanted[r.id]) for r in requests) >= REQUESTS - 1


def _events(pair: ByHand, request: Request) -> list[Event]:
    """Of one request, while denoiser and context tower take turns."""
    pair.denoisers[0].add(request)
    told: list[Event] = []
    with torch.inference_mode():
        for _ in range(200):
            pair.context.tick(), pair.denoisers[0].tick()
    told += pair.events
    pair.events.clear()
    return told


def _always(size: int) -> Callable[..., int]:
    return lambda params, own, most: min(size, most)


@pytest.mark.parametrize("size", [0, 16])
def test_it_tells_what_it_did(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = ByHand(towers_of("tt_dense"))
    monkeypatch.setattr(pair.denoisers[0]._auto, "alone", _always(size))
    blocks = [e for e in _events(pair, _auto([5, 6, 7], 50, ignore_eos=True)) if isinstance(e, BlockEvent)]
    assert sum(len(block.token_ids) for block in blocks) == 50
    first, *others = blocks
    assert (len(first.token_ids), first.num_blocks) == (1, 0), "it comes with the prompt"
    if size:
        assert [len(block.token_ids) for block in others] == [16, 16, 16, 1]
        assert all(block.num_ar_blocks == block.num_blocks == 1 and not block.num_steps for block in others)
    else:
        assert all(block.num_blocks == 1 and block.num_steps for block in others[:-1])
        assert sum(block.num_ar_blocks for block in others[:-1]) == 0, "the last token alone needs no draft"


def test_room_is_kept_where_it_writes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that fills its room to the last page."""
    pair = ByHand(towers_of("tt_moe"))
    monkeypatch.setattr(pair.denoisers[0]._auto, "alone", _always(40))
    request = _auto([5, 6, 7, 8], 29, block_size=40, ignore_eos=True)
    assert request.positions == 32 == _as_ar(request).positions
    tokens = [t for e in _events(pair, request) if isinstance(e, BlockEvent) for t in e.token_ids]
    assert tokens == alone(towers_of("tt_moe"), [_as_ar(request)])[request.id].token_ids and len(tokens) == 29


def test_a_cancel_while_it_writes_alone_frees_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = ByHand(towers_of("tt_dense"))
    [engine] = pair.denoisers
    monkeypatch.setattr(engine._auto, "alone", _always(100))
    engine.add(_auto([5, 6, 7], 150, block_size=100, ignore_eos=True))
    with torch.inference_mode():
        for _ in range(12):
            pair.context.tick(), engine.tick()
        assert len(pair.events) == 1, "the first token; others are being written"
        engine.cancel(RequestId("r"))
        for _ in range(4):
            engine.tick(), pair.context.tick()
    assert pair.context.cache.room.free_slots == pair.context.cache.room.slots and len(pair.events) == 2


def test_logits_that_are_not_finite_fail_the_request_while_it_writes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, towers = ByHand(towers_of("tt_dense")), towers_of("tt_dense")
    monkeypatch.setattr(pair.denoisers[0]._auto, "alone", _always(16))
    healthy, calls = towers.context.logits, iter(range(1000))
    monkeypatch.setattr(towers.context, "logits", lambda h: healthy(h) * (1 if next(calls) < 5 else torch.nan))
    errors = [e.error for e in _events(pair, _auto([5, 6], 40, ignore_eos=True)) if isinstance(e, FailureEvent)]
    assert len(errors) == 1 and isinstance(errors[0], NumericalError) and "context" in str(errors[0])
    assert pair.context.cache.room.free_slots == pair.context.cache.room.slots


def _note(meter: Meter, kind: Pass, rows: int, seconds: float, times: int = 5) -> None:
    """As many readings as it takes to believe them; equal ones would count as one."""
    for number in range(times):
        meter.note(kind, rows, seconds + 1e-9 * number)


def _weighed(rows: int, step: float, read: float, token: float, **params: Any) -> tuple[Auto, list[Weighed]]:
    meter = Meter()
    for kind, seconds in zip(Pass, (step, read, token), strict=True):
        _note(meter, kind, rows, seconds)
    auto = Auto(meter, apart=False)
    auto.look(rows)
    return auto, [Weighed(auto, DecodingParams(Mode.AUTO, **params)) for _ in range(rows)]


def _play(weighed: Sequence[Weighed], accepted: int, blocks: int) -> tuple[int, int]:
    """Drafts, and tokens alone."""
    drafts = tokens = 0
    for one in [*weighed] * blocks:
        alone = one.alone(1000)
        one.ended(0 if alone else 2, alone or accepted)
        drafts, tokens = drafts + (not alone), tokens + alone
    return drafts, tokens


@pytest.mark.parametrize("rows", [1, 5])
def test_drafts_that_do_not_pay_take_two_per_cent_of_the_time(rows: int) -> None:
    _, weighed = _weighed(rows, 0.013, 0.011, 0.006)
    _play(weighed, 0, 20)
    drafts, tokens = _play(weighed, 0, 1000)
    lost_s = drafts * (0.037 - 0.006 / rows)
    assert drafts >= 5 and 0.01 < lost_s / (tokens * 0.006 / rows) < 0.03


def test_each_kind_of_drafts_is_tried() -> None:
    """The one whose tries lose little leaves time to the other."""
    auto, _ = _weighed(2, 0.013, 0.011, 0.006)
    cheap, dear = (
        Weighed(auto, DecodingParams(Mode.AUTO, block_size=size, draft_steps=steps))
        for size, steps in ((16, 2), (64, 16))
    )
    for one, steps in ((cheap, 2), (dear, 16)):
        for _ in range(20):
            one.ended(steps, 0)
    tried = {cheap: 0, dear: 0}
    for _ in range(4000):
        for one, steps in ((cheap, 2), (dear, 16)):
            alone = one.alone(1000)
            tried[one] += not alone
            one.ended(0 if alone else steps, alone)
    assert min(tried.values()) >= 3, tried


def test_good_drafts_are_never_left_out() -> None:
    _, weighed = _weighed(5, 0.013, 0.011, 0.006)
    assert _play(weighed, 15, 100) == (500, 0)


def test_it_follows_what_drafts_are_worth() -> None:
    _, weighed = _weighed(2, 0.013, 0.011, 0.006)
    _play(weighed, 0, 200)
    assert _play(weighed, 0, 100)[0] < 20
    _play(weighed, 15, 200)
    assert _play(weighed, 15, 100)[0] > 180


def test_each_request_goes_its_own_way() -> None:
    _, (good, bad) = _weighed(2, 0.013, 0.011, 0.006)
    for _ in range(100):
        _play([good], 15, 1)
        _play([bad], 0, 1)
    assert good.alone(1000) == 0 and bad.alone(1000) == 16


def test_all_requests_of_a_kind_change_together_and_sooner_than_one_alone() -> None:
    """Rows that go one way share their passes."""
    auto, weighed = _weighed(4, 0.013, 0.011, 0.006)
    _play(weighed, 15, 20)
    for accepted, wanted in ((5.0, 0), (4.2, 16)):  # with 5.2 as fast as tokens alone
        auto.drafts(DecodingParams(Mode.AUTO)).tokens = accepted
        assert Weighed(auto, DecodingParams(Mode.AUTO)).alone(1000) == wanted
    bad = Weighed(auto, DecodingParams(Mode.AUTO))
    for _ in range(12):
        bad.ended(2, 0)
    auto.drafts(DecodingParams(Mode.AUTO)).tokens = 15
    assert bad.alone(1000) == 16 and weighed[0].alone(1000) == 0


def test_an_answer_that_is_almost_over_needs_no_draft() -> None:
    _, [one] = _weighed(1, 0.013, 0.011, 0.006)
    _play([one], 15, 10)
    assert one.alone(16) == 0 and one.alone(3) == 3


def test_a_draft_where_an_answer_ends_says_nothing_of_other_requests() -> None:
    """What it may give is cut, so it would keep others from drafting."""
    auto, [one] = _weighed(1, 0.013, 0.011, 0.006)
    params = DecodingParams(Mode.AUTO)
    one.alone(1000), one.ended(2, 12)
    known = auto.drafts(params).tokens
    one.alone(15), one.ended(2, 0)
    assert auto.drafts(params).tokens == known
    one.alone(16), one.ended(2, 0)
    assert auto.drafts(params).tokens < known


def test_answers_of_less_than_a_block_tell_of_others_too() -> None:
    """Nothing else would, and drafts that are worth nothing would go on for ever."""
    auto, _ = _weighed(1, 0.013, 0.011, 0.006)
    params = DecodingParams(Mode.AUTO, max_new_tokens=8)
    good, bad = Weighed(auto, params), Weighed(auto, params)
    good.alone(7), good.ended(1, 6)
    assert auto.drafts(params).tokens == 15, "all of it stands: nobody knows how much more would"
    bad.alone(7), bad.ended(1, 0)
    assert auto.drafts(params).tokens < 15


def test_a_request_with_many_drafts_tells_as_much_of_others_as_one_with_two() -> None:
    """The worse drafts are, the more of them an answer takes."""
    auto, [one] = _weighed(1, 0.013, 0.011, 0.006)
    told = []
    for _ in range(6):
        one.alone(1000), one.ended(2, 0)
        told.append(auto.drafts(DecodingParams(Mode.AUTO)).tokens)
    assert told[0] > told[1] == told[-1]


def test_tries_tell_that_drafts_are_better_than_it_was_thought() -> None:
    """A row that tries had written alone, as all others do."""
    _, weighed = _weighed(8, 0.013, 0.011, 0.006)
    _play(weighed, 0, 10)
    drafts, tokens = _play(weighed, 15, 300)
    assert drafts > tokens / 16, "most blocks, as soon as a few tries have shown it"


def test_it_follows_what_passes_cost() -> None:
    auto, [one] = _weighed(1, 0.013, 0.011, 0.006)
    for _ in range(10):
        one.ended(2, 8)
    assert one.alone(1000) == 0
    _note(auto._meter, Pass.TOKEN, 1, 0.002, times=20)
    auto.look(1)
    assert one.alone(1000) == 16


def test_more_rows_than_were_ever_seen_are_tried() -> None:
    """Where tokens alone are dear with many rows, it draws back once it has seen that."""
    auto, weighed = _weighed(1, 0.013, 0.011, 0.006)
    for kind, seconds in ((Pass.STEP, 0.07), (Pass.READ, 0.10)):
        _note(auto._meter, kind, 64, seconds)
    auto.look(64)
    [one] = weighed
    for _ in range(10):
        one.ended(2, 10)
    assert one.alone(1000) == 16
    _note(auto._meter, Pass.TOKEN, 64, 0.05)
    auto.look(64)
    assert one.alone(1000) == 0


def test_before_it_knows_what_passes_cost_it_has_a_look_at_each() -> None:
    meter = Meter()
    auto = Auto(meter, apart=False)
    auto.look(1)
    one = Weighed(auto, DecodingParams(Mode.AUTO))
    assert one.alone(1000) == 0
    _note(meter, Pass.STEP, 1, 0.01)
    _note(meter, Pass.READ, 1, 0.01)
    auto.look(1)
    assert one.alone(1000) == 4


FLOOR = {"floor": Floor.CONFIDENCE, "confidence_threshold": 0.5}


def test_with_a_floor_of_confidence_it_takes_diffusion_where_that_is_faster() -> None:
    request = _auto([5], 20, **FLOOR)
    auto, _ = _weighed(4, 0.013, 0.011, 0.006)
    for _ in range(60):
        auto.drafted(request.params, 2, 3)
    assert auto.begin(request) is Mode.DIFFUSION, "nobody knows yet how many steps its blocks take"
    auto.diffused(request.params, 3, 16)
    assert auto.begin(request) is Mode.DIFFUSION
    for _ in range(80):
        auto.diffused(request.params, 16, 16)
    assert auto.begin(request) is Mode.VERIFIED, "16 steps a block are slower than ar"
    assert auto.begin(replace(request, params=replace(request.params, floor=Floor.LOSSLESS))) is Mode.VERIFIED
    assert auto.begin(replace(request, committed=(5,))) is Mode.VERIFIED, "the context tower wrote that"
    begun = [auto.begin(request) for _ in range(100)]
    assert begun.count(Mode.DIFFUSION) == 0, "it is far slower: 0.07 s a token against 0.006"


@NAMES
@pytest.mark.parametrize("chosen", [Mode.DIFFUSION, Mode.VERIFIED])
@pytest.mark.slow
def test_the_tokens_are_those_of_what_was_chosen(name: str, chosen: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    towers = towers_of(name)
    request = _auto([5, 6, 7], 40, temperature=0.7, seed=11, ignore_eos=True, **FLOOR)
    given = {"confidence_threshold": 0.5} if chosen is Mode.DIFFUSION else {}
    named = DecodingParams(Mode.DIFFUSION if given else Mode.AR, 40, temperature=0.7, seed=11, ignore_eos=True, **given)
    pair = ByHand(towers)
    monkeypatch.setattr(pair.denoisers[0]._auto, "begin", lambda request: chosen)
    blocks = [e for e in _events(pair, request) if isinstance(e, BlockEvent)]
    wanted = alone(towers, [replace(request, params=named)])[request.id]
    assert [token for block in blocks for token in block.token_ids] == wanted.token_ids
    assert sum(b.num_diffusion_blocks for b in blocks) == (3 if chosen is Mode.DIFFUSION else 0)
