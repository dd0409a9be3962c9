"""Attention over pages in place against the plain path, over stand-ins for the two kernels; when it is picked; what
states hand over."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.flash_stand_ins import PAGED, FlashStandIns, Load
from tests.goldens import CPU, MODELS, golden
from twotower.config import ModelConfig
from twotower.model.cache import TowerCache
from twotower.model.kernels import Kernels, choice, choose, describe, install, paged_attention
from twotower.model.kernels.paged_attention import ByTable
from twotower.model.kernels.parity import PAGED_TOLERANCE, TOLERANCE, paged_deviations
from twotower.model.pages import ZERO_PAGE
from twotower.model.tower import DenoiserTower

CONFIG = ModelConfig(
    hybrid_override_pattern="*", hidden_size=32, num_attention_heads=8, num_key_value_heads=2, head_dim=16
)


class OtherOrder(FlashStandIns):
    def _paged(self, part_ZKSE: Tensor, table_RZ: Tensor) -> Tensor:
        return super()._paged(part_ZKSE, table_RZ.flip(1))


class AnotherRows(FlashStandIns):
    def _paged(self, part_ZKSE: Tensor, table_RZ: Tensor) -> Tensor:
        return super()._paged(part_ZKSE, table_RZ.roll(1, 0))


class OneKeyMore(FlashStandIns):
    def _seen(self, at_q: Tensor, at_k: Tensor, num_q: Tensor | int, used_k: Tensor, causal: bool) -> Tensor:
        return super()._seen(at_q, at_k, num_q, used_k + 1, causal)


class TopLeft(FlashStandIns):
    def _seen(self, at_q: Tensor, at_k: Tensor, num_q: Tensor | int, used_k: Tensor, causal: bool) -> Tensor:
        return (at_k < used_k) & ((at_k <= at_q) if causal else True)


class OtherLogarithm(FlashStandIns):
    """Base 2, as the compiled kernels compute inside."""

    def _weighed(self, *given: Any) -> tuple[Tensor, Tensor]:
        out, sums = super()._weighed(*given)
        return out, sums * 1.4427


class Writes(FlashStandIns):
    """Appends what it was given, as the real one does with `k` and `v`."""

    def _paged(self, part_ZKSE: Tensor, table_RZ: Tensor) -> Tensor:
        found = super()._paged(part_ZKSE, table_RZ)
        part_ZKSE[int(table_RZ[0, 0]), 0] += 1
        return found


WRONG = [OtherLogarithm, OneKeyMore, OtherOrder, AnotherRows, TopLeft, Writes]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


adapters = pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(adapter, id=name, marks=[pytest.mark.slow] if name.startswith("torch") else [])
        for name, adapter in PAGED.items()
    ],
)


@adapters
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_plain_path(adapter: Callable[[Load], ByTable], dtype: torch.dtype) -> None:
    stand_ins = FlashStandIns(any_dtype=dtype is torch.float32)
    attend = paged_attention.attention(adapter(stand_ins.load))
    deviations = list(paged_deviations(attend, CONFIG, CPU, dtype))
    for case, deviation in deviations:
        assert deviation <= (1e-5 if dtype is torch.float32 else TOLERANCE), case
    for wanted in ("causal [3,130], 65 after 1040 of 1040", "block [3,16], 8 after 5 of 37", "block [3,1], 1 after 0"):
        assert any(wanted in case for case, _ in deviations)
    passes = 2 * (1 + 4 * 2)  # caches; a step, and two ways to fill each longer pass
    assert stand_ins.calls == passes * (1 + 2)  # a block is looked at twice: the pages, and itself


@pytest.mark.gpu
@adapters
def test_the_real_ones_agree_on_cuda(adapter: Callable[[Load], ByTable]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    load = pytest.importorskip
    if adapter is PAGED["torch varlen_attn"] and (
        why := paged_attention.varlen_misfit(load("torch.nn.attention.varlen"))
    ):
        pytest.skip(why)
    attend = paged_attention.attention(adapter(load))
    wide = replace(CONFIG, num_attention_heads=32, head_dim=128)
    for case, deviation in paged_deviations(attend, wide, torch.device("cuda"), torch.bfloat16):
        assert deviation <= PAGED_TOLERANCE, case


def _choose_as_on_cuda(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], ModuleType]) -> Kernels:
    monkeypatch.setattr(choice._Candidates, "_allowed", lambda self, bfloat16_only: None)
    return choose(CONFIG, CPU, torch.bfloat16, load=load)


def test_flash_attn_is_picked_where_it_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _choose_as_on_cuda(monkeypatch, FlashStandIns().load)
    assert kernels.attend_in_pages is not None
    assert "; attention in pages: flash_attn (agrees with torch here); " in str(kernels)
    tower = DenoiserTower(CONFIG)
    install(tower, kernels)
    assert tower.layers[0].mixer.attend_in_pages is kernels.attend_in_pages  # type: ignore[union-attr]
    assert "attention in pages: flash_attn" in describe(tower)


@pytest.mark.slow
def test_torchs_own_is_picked_without_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _choose_as_on_cuda(monkeypatch, lambda name: FlashStandIns().load(name.replace("flash_", "absent_")))
    chosen = "; attention in pages: torch varlen_attn (agrees with torch here, No module named 'absent_attn'); "
    assert chosen in str(kernels) and kernels.attend_in_pages is not None


@pytest.mark.parametrize("wrong", [OtherLogarithm, OneKeyMore, Writes])
def test_what_is_wrong_shows(wrong: type[FlashStandIns]) -> None:
    attend = paged_attention.attention(PAGED["flash_attn"](wrong(any_dtype=True).load))
    assert any(deviation > PAGED_TOLERANCE for _, deviation in paged_deviations(attend, CONFIG, CPU, torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_declined(
    wrong: type[FlashStandIns], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = _choose_as_on_cuda(monkeypatch, wrong().load)
    assert kernels.attend_in_pages is None
    assert "attention in pages: none, pages are gathered (flash_attn differs from torch by " in str(kernels)
    for name in ("flash_attn", "torch varlen_attn"):
        assert f"attention in pages: {name} differs from torch by " in caplog.text


def test_what_is_missing_or_too_old_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    def old(q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, causal: bool = False) -> Tensor:
        return q

    def varlen_attn(query: Tensor, *, seqused_k: Tensor) -> Tensor:
        return query

    def load(name: str) -> Any:
        old.__name__ = "flash_attn_with_kvcache"
        modules = {
            "flash_attn": SimpleNamespace(flash_attn_with_kvcache=old),
            "torch.nn.attention.varlen": SimpleNamespace(varlen_attn=varlen_attn),
        }
        if name not in modules:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return modules[name]

    chosen = choose(CONFIG, CPU, torch.bfloat16)
    assert "; attention in pages: none, pages are gathered (no CUDA); " in str(chosen)
    too_old = (
        "flash_attn_with_kvcache has no block_table and no return_softmax_lse, "
        "varlen_attn has no block_table and no num_splits"
    )
    chosen = _choose_as_on_cuda(monkeypatch, load)
    assert f"; attention in pages: none, pages are gathered ({too_old}); " in str(chosen)


def test_fp32_is_left_to_torch() -> None:
    candidates = choice._Candidates(CONFIG, torch.device("cuda"), torch.float32, "auto", FlashStandIns().load)
    for candidate in (candidates.paged_flash_attn, candidates.paged_varlen_attn):
        with pytest.raises(choice._Declined, match="a model that is not bfloat16"):
            candidate()


def test_states_hand_over_large_pages_only() -> None:
    config = golden(MODELS[0]).checkpoint.config
    new = torch.ones(1, 3, config.num_key_value_heads, config.head_dim)
    layer = config.layers_of("*")[0]
    for page_tokens, in_place in ((16, False), (256, True), (512, True), (128, False)):
        cache = TowerCache(config, 1, 2, CPU, torch.float32, page_tokens=page_tokens)
        slot = cache.allocate(20)
        found = cache.extending([slot], [3], 3).in_pages(layer, new, new)
        assert (found is not None) is in_place
        assert bool(cache.keys.any()) is in_place, "nothing is written where nothing is handed over"
        assert (cache.reading([slot], [3], 3).in_pages(layer, new, new) is not None) is in_place


def test_what_states_hand_over() -> None:
    """A row at the edge of its page, one that has read nothing, and one beside them that is padded."""
    config = golden(MODELS[0]).checkpoint.config
    cache = TowerCache(config, 3, 6, CPU, torch.float32, page_tokens=256)
    slots = [cache.allocate(600), cache.allocate(40), cache.allocate(40)]
    cache.advance(slots[0], 255)
    cache.advance(slots[2], 20)
    layer = config.layers_of("*")[0]
    new = torch.ones(3, 16, config.num_key_value_heads, config.head_dim)
    before = cache.keys.clone()
    looked = cache.reading(slots, [16, 16, 5], 16).in_pages(layer, 2 * new, 3 * new)
    assert looked is not None and looked.own is not None
    assert torch.equal(cache.keys, before), "a denoiser's pass writes nothing"
    assert looked.ends_R.tolist() == [255, 0, 20] and looked.own.lengths_R.tolist() == [16, 16, 5]
    assert looked.table_RZ.tolist() == [[cache.pages_of(slot)[0]] for slot in slots]
    assert looked.own.keys.unique().tolist() == [2] and looked.own.values.unique().tolist() == [3]
    read = cache.extending(slots, [16, 16, 5], 16).in_pages(layer, 2 * new, 3 * new)
    assert read is not None and read.own is None
    assert read.ends_R.tolist() == [271, 16, 36], "padding counts: causality is aligned to the last of 16 positions"
    first, second = cache.pages_of(slots[0])[:2]
    assert read.table_RZ.tolist() == [[first, second], *[[cache.pages_of(s)[0], ZERO_PAGE] for s in slots[1:]]]
    assert read.keys[first, 255].eq(2).all() and read.keys[second, :15].eq(2).all() and not read.keys[second, 15].any()
    assert not read.keys[cache.pages_of(slots[2])[0], 25:].any(), "padding lies elsewhere"
    for found in (looked, read):
        assert {found.table_RZ.dtype, found.ends_R.dtype} == {torch.int32} and found.table_RZ.is_contiguous()


def test_a_table_is_as_wide_as_padding_reaches() -> None:
    """A short row far ahead: its padding ends on a page that no row has."""
    config = golden(MODELS[0]).checkpoint.config
    cache = TowerCache(config, 2, 4, CPU, torch.float32, page_tokens=256)
    slots = [cache.allocate(256), cache.allocate(20)]
    cache.advance(slots[0], 255)
    new = torch.ones(2, 16, config.num_key_value_heads, config.head_dim)
    states = cache.extending(slots, [1, 16], 16)
    assert states.starts_R is None, "gathered, this pass needs the mask"
    read = states.in_pages(config.layers_of("*")[0], new, new)
    assert read is not None
    assert read.ends_R.tolist() == [271, 16]
    assert read.table_RZ[0].tolist() == [cache.pages_of(slots[0])[0], ZERO_PAGE]
