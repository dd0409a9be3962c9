"""A block that is read and then cut leaves what its accepted tokens would have left, read one by one."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.goldens import CPU, MODELS, golden
from twotower.engine.capture import passes_for
from twotower.engine.graphs import FixedPasses
from twotower.engine.passes import EagerPasses, Passes, Want
from twotower.engine.recorded import RecordedPasses
from twotower.model import rescan
from twotower.model.cache import Span, TowerCache
from twotower.model.mamba import ScanInputs, step
from twotower.model.rescan import KeptScans, settle
from twotower.model.tower import ContextTower

ROOM = 200
KINDS: dict[str, Callable[[ContextTower, TowerCache], Passes]] = {
    "eager": EagerPasses,
    "recorded": lambda tower, cache: RecordedPasses(tower, cache, often=1),
    "fixed": lambda tower, cache: FixedPasses(tower, cache, cache.scratch_slot),
}


def _cache(tower: ContextTower, rows: int) -> TowerCache:
    return TowerCache(tower.config, rows, rows * 16, CPU, torch.float32)


def _one_by_one(tower: ContextTower, prompt: list[int], tokens: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits after each of `tokens`, and the whole state behind them."""
    cache = _cache(tower, 1)
    passes, slot = EagerPasses(tower, cache), cache.allocate(ROOM)
    passes.run([slot], [prompt], want=Want.STATES)
    cache.advance(slot, len(prompt))
    logits = []
    for token in tokens:
        logits.append(passes.run([slot], [[token]])[0, 0])
        cache.advance(slot, 1)
    return logits, cache.delta([Span(slot, 0, cache.length(slot))])


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind == "recorded" else kind for kind in KINDS]
)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_and_states_are_those_of_reading_token_by_token(name: str, kind: str) -> None:
    tower, draw = golden(name).context, random.Random(name)
    prompts = [[draw.randrange(4, 60) for _ in range(length)] for length in (1, 7, 33, 20)]
    blocks = [[draw.randrange(4, 60) for _ in range(length)] for length in (16, 9, 16, 1)]
    cuts = [5, 9, 16, 1]
    cache = _cache(tower, len(prompts))
    passes = KINDS[kind](tower, cache)
    slots = [cache.allocate(ROOM) for _ in prompts]
    for slot, prompt in zip(slots, prompts, strict=True):
        passes.run([slot], [prompt], want=Want.STATES)
        cache.advance(slot, len(prompt))
    for _ in range(2):  # the second block stands on what the first one left
        hidden_RLD, scans = passes.verify(slots, blocks)
        cache.settle(slots, scans, cuts)
        for row, (slot, prompt, block, cut) in enumerate(zip(slots, prompts, blocks, cuts, strict=True)):
            logits, state = _one_by_one(tower, prompt, block[:cut])
            torch.testing.assert_close(tower.logits(hidden_RLD[row, :cut]), torch.stack(logits), atol=1e-4, rtol=1e-5)
            assert cache.length(slot) == len(prompt) + cut
            for ours, wanted in zip(cache.delta([Span(slot, 0, cache.length(slot))]), state, strict=True):
                torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-5)
            prompt += block[:cut]


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_pass_changes_no_state_before_it_is_settled(name: str) -> None:
    tower = golden(name).context
    cache = _cache(tower, 2)
    passes, slot = passes_for(tower, cache, "off"), cache.allocate(ROOM)
    passes.run([slot], [[5, 6, 7]], want=Want.STATES)
    cache.advance(slot, 3)
    before = cache.delta([Span(slot, 0, 3)])
    passes.verify([slot], [[9] * 16])
    assert cache.length(slot) == 3
    assert all(torch.equal(*each) for each in zip(before, cache.delta([Span(slot, 0, 3)]), strict=True))


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_block_longer_than_the_scans_chunk(name: str) -> None:
    tower, draw = golden(name).context, random.Random(1)
    width = 2 * tower.config.chunk_size + 3
    block = [draw.randrange(4, 60) for _ in range(width)]
    cache = TowerCache(tower.config, 1, 40, CPU, torch.float32)
    passes, slot = EagerPasses(tower, cache), cache.allocate(width + 1)
    passes.run([slot], [[5]], want=Want.STATES)
    cache.advance(slot, 1)
    _, scans = passes.verify([slot], [block])
    cache.settle([slot], scans, [tower.config.chunk_size + 1])
    whole = TowerCache(tower.config, 1, 40, CPU, torch.float32)
    whole_slot = whole.allocate(width)
    EagerPasses(tower, whole).run([whole_slot], [[5, *block[: tower.config.chunk_size + 1]]], want=Want.STATES)
    for ours, wanted in (
        (cache.ssm[:, slot], whole.ssm[:, whole_slot]),
        (cache.conv[:, slot], whole.conv[:, whole_slot]),
    ):
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("at_once", [1, 1 << 30])
def test_rescanning_is_the_bare_recurrence(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers go together; a row's numbers are its own, and slots nobody named stay as they are."""
    monkeypatch.setattr(rescan, "MOST_NUMBERS", at_once)
    torch.manual_seed(0)
    layers, rows, length, heads, width, groups, state, window, channels = 3, 2, 6, 4, 3, 2, 5, 4, 7
    x, dt = torch.randn(layers, rows, length, heads, width), torch.rand(layers, rows, length, heads)
    a, b = -torch.rand(layers, heads), torch.randn(layers, rows, length, groups, state)
    stream = torch.randn(layers, rows, window + length, channels)
    scans = KeptScans(stream, torch.exp(dt * a[:, None, None]), dt[..., None] * x, b)
    scans.gain[:, 0, 4:] = torch.nan  # beyond the cut
    ssm, conv = torch.randn(layers, 4, heads, width, state), torch.randn(layers, 4, window, channels)
    ssm_before, conv_before = ssm.clone(), conv.clone()
    cuts, slots = [4, 6], [2, 0]
    settle(conv, ssm, slots, scans, cuts)
    for row, (slot, cut) in enumerate(zip(slots, cuts, strict=True)):
        for layer in range(layers):
            wanted = ssm_before[layer, slot, None]
            for place in range(cut):
                given = (t[layer, row, None, place, None] for t in (x, dt, b, b))
                one_x, one_dt, one_b, one_c = given
                _, wanted = step(ScanInputs(one_x, one_dt, a[layer], one_b, one_c), wanted)
            torch.testing.assert_close(ssm[layer, slot, None], wanted)
        assert torch.equal(conv[:, slot], stream[:, row, cut : cut + window])
    for untouched in (1, 3):
        assert torch.equal(ssm[:, untouched], ssm_before[:, untouched])
        assert torch.equal(conv[:, untouched], conv_before[:, untouched])
