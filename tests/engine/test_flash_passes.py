"""Passes of both towers over a real cache, through stand-ins for flash-attn and for torch's varlen attention."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from tests.flash_stand_ins import ADAPTERS, FlashStandIns, Load, through
from tests.goldens import CPU, MODELS, golden
from twotower.engine.graphs import FixedPasses
from twotower.engine.passes import EagerPasses, Passes
from twotower.model.cache import TowerCache
from twotower.model.kernels.flash_attention import ByNumber, flash_attn
from twotower.model.tower import ContextTower, DenoiserTower

Kind = Callable[[ContextTower | DenoiserTower, TowerCache], Passes]
KINDS: dict[str, Kind] = {
    "eager": EagerPasses,
    "fixed": lambda tower, cache: FixedPasses(tower, cache, cache.scratch_slot),
}
PROMPTS = (21, 1, 64)
COMMITS = ((16, 16, 16), (5, 16, 3), (1, 1, 1))
BLOCKS = ((16, 16, 16), (16, 8, 1), (1, 1, 1))  # after the prompts and after each commit


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


def _tokens(lengths: Sequence[int]) -> list[list[int]]:
    return [[4 + (7 * row + 3 * place) % 20 for place in range(length)] for row, length in enumerate(lengths)]


def _run(context: ContextTower, denoiser: DenoiserTower, kind: Kind) -> tuple[list[Tensor], list[Tensor]]:
    """The logits of every pass's real positions, and what the cache holds in the end."""
    cache = TowerCache(context.config, 3, 64, CPU, torch.float32)
    reading, denoising = kind(context, cache), kind(denoiser, cache)
    slots = [cache.allocate(length + 40) for length in PROMPTS]
    logits: list[Tensor] = []

    def keep(lengths: Sequence[int], logits_RLV: Tensor) -> None:
        logits.extend(logits_RLV[row, :length].clone() for row, length in enumerate(lengths))

    for lengths in (PROMPTS, *COMMITS):
        keep(lengths, reading.run(slots, _tokens(lengths)))
        for slot, length in zip(slots, lengths, strict=True):
            cache.advance(slot, length)
        for block in BLOCKS:
            keep(block, denoising.run(slots, _tokens(block), [0.5] * 3 if max(block) > 1 else None))
    return logits, [cache.keys[:, 2:], cache.values[:, 2:], cache.conv[:, slots], cache.ssm[:, slots]]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
@pytest.mark.slow
def test_both_towers_give_what_the_plain_path_gives(name: str, kind: Kind, adapter: Callable[[Load], ByNumber]) -> None:
    model, stand_ins = golden(name), FlashStandIns(any_dtype=True)
    kernel = adapter(stand_ins.load)
    found = _run(through(kernel, model.context), through(kernel, model.denoiser), kind)
    wanted = _run(model.context, model.denoiser, EagerPasses)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    passes = (1 + len(COMMITS)) * (1 + len(BLOCKS))
    assert stand_ins.calls == passes * len(model.checkpoint.config.layers_of("*"))


def test_padding_beyond_the_gathered_pages_takes_the_masked_path() -> None:
    """71 keys lie in pages for 80, but a row 16 wide would end at 86."""
    model, stand_ins = golden(MODELS[0]), FlashStandIns(any_dtype=True)
    logits = []
    for tower in (through(flash_attn(stand_ins.load("flash_attn")), model.context), model.context):
        cache = TowerCache(tower.config, 2, 16, CPU, torch.float32)
        slots = [cache.allocate(100), cache.allocate(100)]
        EagerPasses(model.context, cache).run(slots, _tokens([70, 3]))
        cache.advance(slots[0], 70)
        cache.advance(slots[1], 3)
        logits.append(EagerPasses(tower, cache).run(slots, _tokens([1, 16])))
    assert torch.equal(*logits)
    assert stand_ins.calls == 0
