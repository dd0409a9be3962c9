"""Prompts that begin alike are read once, and nobody can tell by the tokens."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from tests.engine.arrangements import Towers, split_pair
from tests.engine.decode import Decoded, collect, decode_all
from tests.goldens import vendored
from twotower.core import BlockEvent, DecodingParams, Event, Mode, ReleasedEvent, Request, RequestId, ScoreRequest
from twotower.engine.context_engine import ContextEngine
from twotower.engine.in_process import pair_of
from twotower.engine.settings import EngineSettings
from twotower.errors import ConfigError
from twotower.model.cache import Span, state_bytes
from twotower.testing import ScriptedContextTower

CHUNK = 16
ON = EngineSettings(max_sequences=8, max_sequence_length=128, prefill_chunk_tokens=CHUNK, max_queued_requests=512)
OFF = replace(ON, prefix_cache_bytes=0)
EDGES = [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 1]
MODES = [DecodingParams(mode, 20, confidence_threshold=0.6, ignore_eos=True) for mode in Mode]


def _text(length: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(4, 60) for _ in range(length))


BASE = _text(3 * CHUNK + 1, 0)


def _prompts(params: DecodingParams, rated: int | None = None) -> list[Request]:
    """The base cut at each edge, alone and with something behind it. The first holds all that the others share."""
    whole = [Request(RequestId("whole"), BASE + _text(5, 9), params, logprobs=rated)]
    ends = [(edge, more) for edge in EDGES for more in (0, 3)]
    return whole + [
        Request(RequestId(f"{edge}+{more}"), BASE[:edge] + _text(more, edge), params, logprobs=rated)
        for edge, more in ends
    ]


def _reusable(request: Request) -> int:
    """Of the base, what a prompt need not read: whole chunks, and never its last token."""
    told = len(request.prompt_token_ids) - (2 if request.params.mode is Mode.MOCK_AR else 1)
    same = next((i for i, (a, b) in enumerate(zip(request.prompt_token_ids, BASE, strict=False)) if a != b), len(BASE))
    return min(told, same) // CHUNK * CHUNK


def _told(one: Decoded) -> tuple[object, ...]:
    return one.token_ids, one.finish_reason  # how `auto` goes about it depends on the clock


def _compare(got: Sequence[Decoded], wanted: Sequence[Decoded]) -> None:
    assert [_told(one) for one in got] == [_told(one) for one in wanted]


_ALL = [pytest.param(p, 1, id=p.mode, marks=pytest.mark.slow) for p in MODES]
_SOME = [pytest.param(p, 4, id=f"{p.mode} some") for p in MODES if p.mode in (Mode.DIFFUSION, Mode.AR)]


@pytest.mark.parametrize(("params", "every"), _SOME + _ALL)
@pytest.mark.slow
def test_the_same_tokens_in_every_mode_at_every_edge(params: DecodingParams, every: int) -> None:
    model, requests = vendored("tt_moe"), _prompts(params)[::every]
    wanted = decode_all(model.context, model.denoiser, requests, together=False, settings=OFF)
    got = decode_all(model.context, model.denoiser, requests, together=False, settings=ON)
    _compare(got, wanted)
    assert not any(one.cached_tokens for one in wanted)
    assert [one.cached_tokens for one in got[1:]] == [_reusable(request) for request in requests[1:]]


@pytest.mark.slow
def test_the_same_tokens_in_company_and_with_likelihoods() -> None:
    """Those that come at once wait for the one that reads for them all."""
    model = vendored("tt_dense")
    requests = [
        replace(request, id=RequestId(f"{request.id} {params.mode}"))
        for params in MODES
        for request in _prompts(params, rated=1 if params.mode is not Mode.AR else None)[::4]
    ]
    wanted = decode_all(model.context, model.denoiser, requests, together=False, settings=OFF)
    got = decode_all(model.context, model.denoiser, requests, settings=ON)
    _compare(got, wanted)
    assert sum(one.cached_tokens for one in got) > len(requests) * CHUNK


def test_the_same_scores_and_none_is_skipped() -> None:
    model = vendored("tt_moe")
    starts = [1, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK + 1, 3 * CHUNK + 1]
    asked = [ScoreRequest(RequestId(f"from {start}"), BASE + _text(4, 3), start) for start in starts]

    async def run(settings: EngineSettings) -> list[tuple[tuple[float, ...], int]]:
        async with pair_of(model.context, None, settings) as pair:
            events = [await pair.score(request) for request in asked]
        return [(event.log_probs, event.cached_tokens) for event in events]

    got, wanted = asyncio.run(run(ON)), asyncio.run(run(OFF))
    assert [log_probs for log_probs, _ in got] == [log_probs for log_probs, _ in wanted]
    assert [cached for _, cached in got] == [0, 0, CHUNK, CHUNK, 2 * CHUNK, 3 * CHUNK]


class ByHand:
    """A context engine, ticked by hand."""

    def __init__(self, settings: EngineSettings = ON, tower: Any = None) -> None:
        self.events: list[Event] = []
        self.engine = ContextEngine(tower or vendored("tt_moe").context, settings, self.events.append)
        self.whole = self.engine.cache.room.free_slots, self.engine.cache.room.free_pages

    def until_quiet(self) -> "ByHand":
        with torch.inference_mode():
            while self.engine.tick():
                pass
        return self

    def ticks(self, count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                self.engine.tick()

    @property
    def free(self) -> tuple[int, int]:
        return self.engine.cache.room.free_slots, self.engine.cache.room.free_pages

    def tokens(self, name: str) -> list[int]:
        return [t for e in self.events if isinstance(e, BlockEvent) and e.request_id == name for t in e.token_ids]


def _ar(name: str, prompt: Sequence[int], new: int = 8, salt: str | None = "") -> Request:
    params = DecodingParams(Mode.AR, new, ignore_eos=True)
    return Request(RequestId(name), tuple(prompt), params, cache_salt=salt)


def test_the_states_behind_a_hit_are_the_same_bits() -> None:
    prompt, states = BASE + _text(7, 1), []
    for settings in (ON, OFF):
        hand = ByHand(settings)
        hand.engine.add(_ar("first", BASE))
        hand.until_quiet()
        hand.engine.add(_ar("second", prompt, new=40))
        while not hand.tokens("second"):
            hand.ticks(1)
        slot = hand.engine._sequences["second"].slot
        states.append(hand.engine.cache.delta([Span(slot, 0, len(prompt))]))
        assert hand.engine.prefixes.hits == (settings is ON)
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_pages_are_shared_and_never_copied() -> None:
    """Two that begin alike hold one set of pages, and what is written behind is each one's own."""
    hand = ByHand()
    for name, seed in (("a", 1), ("b", 2)):
        hand.engine.add(_ar(name, BASE[: 2 * CHUNK] + _text(9, seed), new=30))
    hand.ticks(8)
    first, second = (hand.engine.cache.pages_of(hand.engine._sequences[name].slot) for name in "ab")
    assert first[:2] == second[:2] and not set(first[2:]) & set(second[2:])
    assert hand.whole[1] - hand.free[1] == len(first) + len(second) - 2
    hand.until_quiet()
    assert hand.free == hand.whole and hand.engine.cache.room.kept_pages == 2


def test_what_is_kept_gives_way_to_whoever_needs_the_pages() -> None:
    """Prompts one after the other through a cache that holds one of them: each is served, none leaves anything."""
    hand = ByHand(replace(ON, max_sequences=2, cache_tokens=5 * CHUNK))
    for number in range(6):
        hand.engine.add(_ar(f"{number}", _text(3 * CHUNK + 5, number)))
        hand.until_quiet()
        assert hand.free == hand.whole and len(hand.tokens(f"{number}")) == 8
    assert hand.engine.prefixes.evictions >= 3 * 4
    assert hand.engine.cache.room.kept_pages <= 5


def test_the_budget_is_of_states_and_the_oldest_go_first() -> None:
    tower = vendored("tt_moe").context
    hand = ByHand(replace(ON, prefix_cache_bytes=2 * state_bytes(tower.config, tower.dtype) + 1))
    assert len(hand.engine.cache.snapshots) == 2
    for name, prompt in (("a", _text(CHUNK + 1, 1)), ("b", _text(CHUNK + 1, 2)), ("a2", _text(CHUNK + 1, 1))):
        hand.engine.add(_ar(name, prompt))
        hand.until_quiet()
    hand.engine.add(_ar("c", _text(CHUNK + 1, 3)))  # drives out b, because a was used later
    hand.until_quiet()
    for name, seed in (("a3", 1), ("b2", 2)):
        hand.engine.add(_ar(name, _text(CHUNK + 1, seed)))
        hand.until_quiet()
    cached = {e.request_id: e.cached_tokens for e in hand.events if isinstance(e, BlockEvent) and e.start == 0}
    assert cached == {"a": 0, "b": 0, "a2": CHUNK, "c": 0, "a3": CHUNK, "b2": 0}
    assert hand.free == hand.whole


def test_a_budget_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefix_cache_bytes: got 1, wanted 0 or at least"):
        ByHand(replace(ON, prefix_cache_bytes=1))


@pytest.mark.parametrize("ticks", range(6))
def test_whoever_waits_for_a_reader_that_is_cancelled_reads_himself(ticks: int) -> None:
    wanted = ByHand(OFF)
    wanted.engine.add(_ar("b", BASE))
    wanted.until_quiet()
    hand = ByHand()
    hand.engine.add(_ar("a", BASE))
    hand.engine.add(_ar("b", BASE))
    hand.ticks(ticks)
    hand.engine.cancel(RequestId("a"))
    hand.until_quiet()
    assert hand.tokens("b") == wanted.tokens("b")
    assert sum(isinstance(event, ReleasedEvent) for event in hand.events) == 2
    assert hand.free == hand.whole and len(hand.engine._sequences) == 0


def test_whoever_waits_can_be_cancelled() -> None:
    hand = ByHand()
    for name in "ab":
        hand.engine.add(_ar(name, BASE))
    hand.ticks(1)
    assert hand.engine._sequences["b"].slot == -1
    hand.engine.cancel(RequestId("b"))
    hand.until_quiet()
    assert ReleasedEvent(RequestId("b")) in hand.events and not hand.tokens("b")
    assert hand.free == hand.whole


def test_a_prompt_whose_numbers_are_not_finite_is_not_kept() -> None:
    class Broken(ScriptedContextTower):
        broken = False

        def logits(self, hidden_RLD: torch.Tensor) -> torch.Tensor:
            return super().logits(hidden_RLD) * (float("nan") if self.broken else 1.0)

    tower, prompt = Broken(), [4 + token % 20 for token in BASE]
    hand = ByHand(ON, cast(Any, tower))
    for name, tower.broken in (("a", False), ("b", True), ("c", False)):
        hand.engine.add(_ar(name, prompt))
        hand.until_quiet()
    cached = {e.request_id: e.cached_tokens for e in hand.events if isinstance(e, BlockEvent) and e.start == 0}
    assert cached == {"a": 0, "c": 0} and hand.engine.prefixes.hits == 1 and hand.free == hand.whole


def test_only_the_same_salt_shares_and_without_one_nothing_is_kept() -> None:
    hand = ByHand()
    for name, salt in (("none", None), ("a", "x"), ("b", "y"), ("c", "x"), ("none again", None)):
        hand.engine.add(_ar(name, BASE, salt=salt))
        hand.until_quiet()
    cached = {e.request_id: e.cached_tokens for e in hand.events if isinstance(e, BlockEvent) and e.start == 0}
    assert cached == {"none": 0, "a": 0, "b": 0, "c": 3 * CHUNK, "none again": 0}
    assert len(hand.engine.prefixes) == 2 * 3, "of x and of y"
    assert hand.tokens("none") == hand.tokens("c") and hand.free == hand.whole


@pytest.mark.parametrize("chunk", [8, 24])
def test_a_prefix_ends_where_a_chunk_and_a_page_end(chunk: int) -> None:
    """Chunks that are no whole pages: at their common multiples."""
    hand = ByHand(replace(ON, prefill_chunk_tokens=chunk))
    prompt = _text(60, 5)
    for name in "ab":
        hand.engine.add(_ar(name, prompt))
        hand.until_quiet()
    assert hand.tokens("a") == hand.tokens("b")
    assert hand.engine.prefixes.positions_saved == {8: 48, 24: 48}[chunk]


@pytest.mark.slow
def test_over_mirrors_the_first_deltas_come_from_what_is_kept() -> None:
    model = vendored("tt_moe")
    towers = Towers("tt_moe", model.context, model.denoiser)
    requests = [
        replace(request, id=RequestId(f"{request.id} {params.mode}"))
        for params in MODES
        for request in _prompts(params)[::3]
    ]

    async def run() -> list[Decoded]:
        async with split_pair(towers, 1, ON) as pair:
            first = await collect(pair, requests[0])
            others = await asyncio.gather(*(collect(pair, request) for request in requests[1:]))
            while pair.ledger.running:
                await asyncio.sleep(0.001)
            stats = [one for handle in (pair.context, *pair.denoisers) for one in await handle.stats()]
            assert all(one.free_pages == one.total_pages for one in stats)
            return [first, *others]

    got = asyncio.run(run())
    wanted = decode_all(model.context, model.denoiser, requests, together=False, settings=OFF)
    _compare(got, wanted)
    assert [one.cached_tokens for one in got[1:]] == [_reusable(request) for request in requests[1:]]


def test_a_tower_without_states_shares_its_pages() -> None:
    hand = ByHand(ON, cast(Any, ScriptedContextTower()))
    for name in "ab":
        hand.engine.add(_ar(name, [4 + token % 20 for token in BASE]))
        hand.until_quiet()
    assert hand.tokens("a") == hand.tokens("b") and hand.engine.prefixes.positions_saved == 3 * CHUNK
