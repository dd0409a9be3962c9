"""The guard that sees what crashes nothing: broken states, masks and deltas show as wrong answers or as slow blocks."""

import asyncio
import itertools
import math
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import twotower
from tests.engine.arrangements import LINK, Towers, split_pair
from tests.engine.decode import collect, plain_request
from tests.goldens import vendored
from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.engine.expectation import FILE, Bounds, Expectation, Known, Outcome
from twotower.engine.self_test import score_sample, self_test
from twotower.engine.settings import EngineSettings
from twotower.errors import CheckpointError, Unavailable
from twotower.exchange.settings import SSM_WIRE_DTYPES
from twotower.model import mamba, scaled
from twotower.model.attention import attend
from twotower.model.cache import Span, TowerCache
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower
from twotower.model.pages import PAGE_TOKENS
from twotower.model.row_states import ReadStates
from twotower.model.states import Reach
from twotower.model.tower import ContextTower, DenoiserTower

DEMO = Path(twotower.__file__).parent / "demo" / "checkpoint"
SETTINGS = EngineSettings(max_sequences=16, max_sequence_length=128, capture="off")
KNOWN = [Known((1, 2), (5, 6, 7, 2), -1.5), Known((1, 3), (8, 2), -4.0)] * 10
RIGHT = [Outcome((5, 6, 7, 2), 2), Outcome((8, 2), 1)] * 10


@pytest.fixture(scope="module")
def demo() -> Towers:
    checkpoint = Checkpoint.open(DEMO)
    cpu = torch.device("cpu")
    context = load_context_tower(checkpoint, cpu, torch.float32)
    return Towers("demo", context, load_denoiser_tower(checkpoint, cpu, torch.float32))


async def _try_out(demo: Towers, modes: tuple[Mode, ...]) -> None:
    expected = Expectation.load(DEMO)
    assert expected is not None and {bounds.mode for bounds in expected.bounds} >= {Mode.AR, Mode.DIFFUSION}
    assert all(bounds.min_right > len(expected.sample) / 2 for bounds in expected.bounds)
    async with split_pair(demo, 1, SETTINGS) as pair:
        await self_test(pair, modes, 60, expected)


@pytest.mark.slow
async def test_the_demo_keeps_its_bounds(demo: Towers) -> None:
    """In `mock_ar`, too: see `test_recorded_passes_keep_them_too`."""
    await _try_out(demo, (Mode.AR, Mode.DIFFUSION))


@pytest.mark.long
async def test_recorded_passes_keep_them_too(demo: Towers) -> None:
    async with split_pair(demo, 1, replace(SETTINGS, capture="on")) as pair:
        await self_test(pair, tuple(Mode), 60, Expectation.load(DEMO))


@pytest.mark.slow
async def test_a_cell_without_a_queue_does_not_refuse_its_own_sample(demo: Towers) -> None:
    expected = Expectation.load(DEMO)
    async with split_pair(demo, 1, replace(SETTINGS, max_sequences=4, max_queued_requests=0)) as pair:
        await self_test(pair, (Mode.AR, Mode.DIFFUSION, Mode.VERIFIED, Mode.AUTO), 60, expected)


@pytest.mark.parametrize("wire", [wire for wire in SSM_WIRE_DTYPES if wire != "float32"])
@pytest.mark.slow
async def test_states_rounded_on_the_wire_are_within_its_bounds(demo: Towers, wire: str) -> None:
    """In `mock_ar`, which takes longest, with the coarsest alone."""
    modes = [mode for mode in Mode if mode is not Mode.MOCK_AR or wire == "float8_e4m3fn"]
    async with split_pair(demo, 1, SETTINGS, replace(LINK, ssm_wire_dtype=wire)) as pair:
        await self_test(pair, modes, 60, Expectation.load(DEMO))


@pytest.mark.slow
async def test_a_wire_that_rounds_too_coarsely_is_refused(demo: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    """-1, 0 and 1 instead of 255 numbers: rounding that the checkpoint does not bear shows before anybody is served."""
    monkeypatch.setitem(scaled.TOPS, torch.int8, 1.0)
    async with split_pair(demo, 1, SETTINGS, replace(LINK, ssm_wire_dtype="int8")) as pair:
        with pytest.raises(Unavailable, match="self-test in diffusion mode failed: got"):
            await self_test(pair, (Mode.DIFFUSION,), 60, Expectation.load(DEMO))


@pytest.mark.slow
async def test_without_the_mamba_seed(demo: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ReadStates.mamba

    def unseeded(self: ReadStates, layer: int) -> tuple[Tensor, Tensor]:
        conv, ssm = read(self, layer)
        return torch.zeros_like(conv), torch.zeros_like(ssm)

    monkeypatch.setattr(ReadStates, "mamba", unseeded)
    with pytest.raises(Unavailable, match="self-test in diffusion mode failed: got"):
        await _try_out(demo, (Mode.DIFFUSION,))


@pytest.mark.slow
async def test_with_the_causal_order_broken(demo: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the scan."""
    monkeypatch.setattr(mamba, "_future", lambda length, device: torch.zeros(length, length, dtype=torch.bool))
    with pytest.raises(Unavailable, match="self-test in ar mode failed: got"):
        await _try_out(demo, (Mode.AR,))
    with pytest.raises(Unavailable, match=r"self-test in diffusion mode failed: (got|.* a NaN or an infinity)"):
        await _try_out(demo, (Mode.DIFFUSION,))


def _all_of_it(mask: Tensor) -> Tensor:
    return torch.ones_like(mask)


def _one_key_more(mask: Tensor) -> Tensor:
    return mask | torch.cat([mask[..., :1], mask[..., :-1]], dim=-1)


def _one_key_fewer(mask: Tensor) -> Tensor:
    """But for the first position, which would see none."""
    fewer = mask & torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], dim=-1)
    return torch.where(fewer.any(-1, keepdim=True), fewer, mask)


def _causal_in_the_block(mask: Tensor) -> Tensor:
    length = mask.shape[-2]
    return torch.cat([mask[..., :-length], mask[..., -length:].tril()], dim=-1)


def _nothing_cached(mask: Tensor) -> Tensor:
    length = mask.shape[-2]
    return torch.cat([torch.zeros_like(mask[..., :-length]), mask[..., -length:]], dim=-1)


def _break_attention(
    tower: ContextTower | DenoiserTower, monkeypatch: pytest.MonkeyPatch, broken: Callable[[Tensor], Tensor]
) -> None:
    def attend_otherwise(queries: Tensor, keys: Tensor, values: Tensor, reach: Reach) -> Tensor:
        mask = broken(reach.mask_RLT)
        return attend(queries, keys, values, cast(Reach, SimpleNamespace(mask_RLT=mask)))

    for layer in tower.layers:
        if layer.kind == "*":
            monkeypatch.setattr(layer.mixer, "attend", attend_otherwise)


@pytest.mark.parametrize(
    ("tower", "broken", "said"),
    [
        ("context", _all_of_it, "in ar mode failed: got .* known answers right"),
        # Its answers stay right, for it hardly attends where it must not; how likely it finds known texts does not.
        ("context", _one_key_more, "of scores failed: got likelihoods"),
        pytest.param("context", _one_key_fewer, "of scores failed: got likelihoods", marks=pytest.mark.slow),
        pytest.param(
            *("denoiser", _nothing_cached, "in diffusion mode failed: got .* known answers right"),
            marks=pytest.mark.slow,
        ),
        # The same answers, but more slowly.
        ("denoiser", _causal_in_the_block, "in diffusion mode failed: got .* tokens per step on known"),
    ],
)
@pytest.mark.slow
async def test_with_attention_broken(
    tower: str, broken: Callable[[Tensor], Tensor], said: str, demo: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break_attention(getattr(demo, tower), monkeypatch, broken)
    with pytest.raises(Unavailable, match=f"self-test {said}"):
        await _try_out(demo, (Mode.AR if tower == "context" else Mode.DIFFUSION,))


@pytest.mark.slow
async def test_with_deltas_lost(demo: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mirror counts every second delta as read, but has none of its numbers."""
    write = TowerCache.write
    seen = itertools.count()

    def forgetful(self: TowerCache, spans: list[Any], tensors: list[Tensor]) -> None:
        if next(seen) % 2:
            write(self, spans, tensors)

    monkeypatch.setattr(TowerCache, "write", forgetful)
    with pytest.raises(Unavailable, match="self-test in diffusion mode failed: got"):
        await _try_out(demo, (Mode.DIFFUSION,))


@pytest.mark.slow
async def test_with_nothing_but_the_deltas_of_commits_lost(demo: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence at a time, so that a payload is one delta: prompts arrive, committed blocks do not."""
    expected = Expectation.load(DEMO)
    assert expected is not None
    assert sum(len(known.answer_token_ids) > 16 for known in expected.sample) >= 6, "too few answers of several blocks"
    write = TowerCache.write

    def forgetful(self: TowerCache, spans: list[Span], tensors: list[Tensor]) -> None:
        [span] = spans
        if span.start == 0:
            write(self, spans, tensors)

    monkeypatch.setattr(TowerCache, "write", forgetful)
    async with split_pair(demo, 1, replace(SETTINGS, max_sequences=1, max_sequence_length=256)) as pair:
        with pytest.raises(
            Unavailable, match=r"self-test in diffusion mode failed: got \d+ of \d+ known answers right"
        ):
            await self_test(pair, (Mode.DIFFUSION,), 60, expected)


def test_bounds_leave_slack_and_no_more() -> None:
    bounds = Bounds.around(Mode.DIFFUSION, KNOWN, RIGHT)
    assert bounds == Bounds(Mode.DIFFUSION, 18, 1.88, 2.12)
    assert bounds.shortfall(KNOWN, RIGHT) is None
    wrong = [Outcome((9, 2), 1)] * 4 + RIGHT[4:]
    assert bounds.shortfall(KNOWN, wrong) == "got 16 of 20 known answers right, wanted at least 18"
    slow = [Outcome(got.token_ids, got.num_steps + 1) for got in RIGHT]
    assert bounds.shortfall(KNOWN, slow) == "got 1.20 tokens per step on known prompts, wanted 1.88 to 2.12"


def test_likelihoods_leave_slack_and_no_more() -> None:
    expectation = Expectation(tuple(KNOWN), ())
    right = [known.mean_log_prob for known in KNOWN]
    assert expectation.misread([each + 0.04 for each in right]) is None
    # Half of them more likely, half less: they do not make up for each other.
    off = [each + 0.2 * (-1) ** place for place, each in enumerate(right)]
    assert expectation.misread(off) == "got likelihoods of known texts 0.200 nats a token off, wanted at most 0.05"
    assert expectation.misread([math.nan, *right[1:]]) is not None


def test_it_lies_beside_the_weights(tmp_path: Path) -> None:
    assert Expectation.load(tmp_path) is None
    expectation = Expectation(tuple(KNOWN[:2]), (Bounds.around(Mode.AR, KNOWN, RIGHT),))
    expectation.save(tmp_path)
    assert Expectation.load(tmp_path) == expectation
    (tmp_path / FILE).write_text('[["Expectation", {"sample": []}]]')
    with pytest.raises(CheckpointError, match=r"expectation\.json: not an expectation as .*bounds"):
        Expectation.load(tmp_path)
    older = '[["Expectation", {"sample": [{"prompt_token_ids": [1], "answer_token_ids": [2]}], "bounds": []}]]'
    (tmp_path / FILE).write_text(older)
    with pytest.raises(CheckpointError, match=r"mean_log_prob.*; a checkpoint may do without one"):
        Expectation.load(tmp_path)
    Expectation((), ()).save(tmp_path)
    with pytest.raises(CheckpointError, match="got an empty sample"):
        Expectation.load(tmp_path)


async def test_a_cache_too_small_for_the_sample_is_told(demo: Towers, caplog: pytest.LogCaptureFixture) -> None:
    """Its own answers need four pages, and a fifth in `ar`, which is asked for whole blocks too."""
    expected = Expectation.load(DEMO)
    async with split_pair(demo, 1, replace(SETTINGS, max_sequences=1, cache_tokens=64)) as pair:
        await self_test(pair, (Mode.AR,), 60, expected)
    assert "the cache is too small for the checkpoint's own sample; left out" in caplog.text


async def test_a_cache_that_is_full_just_now_is_not_too_small(demo: Towers, caplog: pytest.LogCaptureFixture) -> None:
    """A denoiser on trial shares the context tower's cache with those who are served meanwhile."""
    expected = Expectation.load(DEMO)
    assert expected is not None
    async with split_pair(demo, 1, replace(SETTINGS, cache_tokens=8 * PAGE_TOKENS)) as pair:
        async with aclosing(pair.generate(plain_request("long", Mode.AR, 100))) as events:
            await anext(events)
            assert pair.ledger.context.free_pages < 5
            short = Expectation(expected.sample[:10], ())
            test = asyncio.create_task(self_test(pair, (Mode.AR,), 60, short))
            await asyncio.sleep(0)
        await test
    assert "left out" not in caplog.text


async def test_nothing_of_its_prompts_is_kept() -> None:
    """Prompts of several chunks, in every mode and scored; the same prompts keep a state each when a user asks."""
    model = vendored("tt_moe")
    towers = Towers("tt_moe", model.context, model.denoiser)
    sample = [Known((*range(4, 44), end), (5, 6), -1.0) for end in (50, 51)]
    expected = Expectation(tuple(sample), tuple(Bounds(mode, 0, 0, 99) for mode in Mode))
    async with split_pair(towers, 1, replace(SETTINGS, prefill_chunk_tokens=16)) as pair:
        await self_test(pair, [mode for mode in Mode if mode is not Mode.AR], 60, expected)
        await score_sample(pair, sample, 60)
        (stats,) = await pair.context.stats()
        assert (stats.prefix_lookups, stats.prefix_bytes) == (0, 0)
        await collect(pair, Request(RequestId("user"), sample[0].prompt_token_ids, DecodingParams(Mode.AR, 1)))
        (stats,) = await pair.context.stats()
        assert stats.prefix_lookups == 1 and stats.prefix_bytes > 0
