"""Attention by numbers of keys against the plain path, over stand-ins for the two kernels; and when it is picked."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.flash_stand_ins import ADAPTERS, FlashStandIns, Load, through
from tests.goldens import CPU, MODELS, golden
from twotower.config import ModelConfig
from twotower.demo.states import FromNothing
from twotower.model.attention import attend
from twotower.model.kernels import Kernels, choice, choose
from twotower.model.kernels.flash_attention import ByNumber, attention, varlen_misfit
from twotower.model.kernels.folded_attention import attend_folded
from twotower.model.kernels.parity import TOLERANCE, attention_deviations
from twotower.model.states import Reach

CONFIG = ModelConfig(
    hybrid_override_pattern="*", hidden_size=32, num_attention_heads=8, num_key_value_heads=2, head_dim=16
)
# torch's own imports torch's compiler, which takes seconds.
adapters = pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(adapter, id=name, marks=[pytest.mark.slow] if name.startswith("torch") else [])
        for name, adapter in ADAPTERS.items()
    ],
)


class TopLeft(FlashStandIns):
    def _seen(self, at_q: Tensor, at_k: Tensor, num_q: Tensor | int, used_k: Tensor, causal: bool) -> Tensor:
        return (at_k < used_k) & ((at_k <= at_q) if causal else True)


class NeverCausal(FlashStandIns):
    def _seen(self, at_q: Tensor, at_k: Tensor, num_q: Tensor | int, used_k: Tensor, causal: bool) -> Tensor:
        return super()._seen(at_q, at_k, num_q, used_k, False)


class OneKeyFewer(FlashStandIns):
    def _seen(self, at_q: Tensor, at_k: Tensor, num_q: Tensor | int, used_k: Tensor, causal: bool) -> Tensor:
        return super()._seen(at_q, at_k, num_q, used_k - 1, causal)


class WholeCache(FlashStandIns):
    def _seen(self, at_q: Tensor, at_k: Tensor, num_q: Tensor | int, used_k: Tensor, causal: bool) -> Tensor:
        return super()._seen(at_q, at_k, num_q, torch.full_like(used_k, int(at_k.max()) + 1), causal)


class OtherGroups(FlashStandIns):
    def _grouped(self, part_RTSE: Tensor, heads: int) -> Tensor:
        return part_RTSE.repeat(1, 1, heads // part_RTSE.shape[2], 1)


WRONG = [
    TopLeft,
    WholeCache,
    *(pytest.param(w, marks=pytest.mark.slow) for w in (NeverCausal, OneKeyFewer, OtherGroups)),
]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


def _unused(*_: object) -> Tensor:
    raise AssertionError("the masked path was taken")


@adapters
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_plain_path(adapter: Callable[[Load], ByNumber], dtype: torch.dtype) -> None:
    stand_ins = FlashStandIns(any_dtype=dtype is torch.float32)
    deviations = list(attention_deviations(attention(adapter(stand_ins.load), _unused), CONFIG, CPU, dtype))
    for case, deviation in deviations:
        assert deviation <= (1e-5 if dtype is torch.float32 else TOLERANCE), case
    for wanted in ("causal [3,130], 65 after 1040 of 1040", "block [3,16], 8 after 5 of 37", "block [3,1], 1 after 0"):
        assert any(wanted in case for case, _ in deviations)
    assert stand_ins.calls == 2 * (1 + 4 * 2) * 2  # caches; a step, and two ways to fill each longer pass; kinds


@pytest.mark.gpu
@adapters
def test_the_real_ones_agree_on_cuda(adapter: Callable[[Load], ByNumber]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    load = pytest.importorskip  # here and not above: torch's brings two seconds of its compiler
    if adapter is ADAPTERS["torch varlen_attn"] and (why := varlen_misfit(load("torch.nn.attention.varlen"))):
        pytest.skip(why)
    kernel = adapter(load)
    wide = replace(CONFIG, num_attention_heads=32, head_dim=128)
    for case, deviation in attention_deviations(attention(kernel, _unused), wide, torch.device("cuda"), torch.bfloat16):
        assert deviation <= TOLERANCE, case


def test_padding_must_come_out_finite() -> None:
    """It goes on to layers that multiply it by zero."""

    def spoiling(queries: Tensor, keys: Tensor, values: Tensor, reach: Reach) -> Tensor:
        out = attend(queries, keys, values, reach)
        if reach.lengths_R is not None:
            out[torch.arange(out.shape[1]) >= reach.lengths_R[:, None]] = torch.nan
        return out

    deviations = list(attention_deviations(spoiling, CONFIG, CPU, torch.float32))
    assert {case.rpartition(", ")[2] for case, deviation in deviations if deviation > TOLERANCE} == {"finite"}


def _choose_as_on_cuda(monkeypatch: pytest.MonkeyPatch, load: Load) -> Kernels:
    monkeypatch.setattr(choice._Candidates, "_allowed", lambda self, bfloat16_only: None)
    return choose(CONFIG, CPU, torch.bfloat16, load=load)


def test_flash_attn_is_picked_where_it_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = str(_choose_as_on_cuda(monkeypatch, FlashStandIns().load))
    assert "; attention: flash_attn (agrees with torch here); " in chosen
    assert "; attention by mask: torch, heads folded (agrees with torch here); " in chosen


@pytest.mark.slow
def test_torchs_own_is_picked_without_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = str(_choose_as_on_cuda(monkeypatch, lambda name: FlashStandIns().load(name.replace("flash_", "absent_"))))
    assert "; attention: torch varlen_attn (agrees with torch here, No module named 'absent_attn'); " in chosen


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_is_declined(
    wrong: type[FlashStandIns], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = _choose_as_on_cuda(monkeypatch, wrong().load)
    assert kernels.attend is attend_folded
    for name in ("flash_attn", "varlen_attn"):
        assert f"{name} differs from torch by " in str(kernels)
        assert f"{name} differs from torch by " in caplog.text


def test_what_fails_or_is_too_old_is_declined(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(FlashStandIns):
        def flash_attn_with_kvcache(self, *_: object, **__: object) -> Tensor:  # type: ignore[override]
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")

        def varlen_attn(self, query: Tensor, *_: object, window_size: object) -> Tensor:  # type: ignore[override]
            return query

    chosen = str(_choose_as_on_cuda(monkeypatch, Failing().load))
    old = f"torch {torch.__version__} has a varlen_attn without seqused_k"
    failed = "flash_attn failed: RuntimeError: FlashAttention only supports Ampere GPUs or newer."
    assert f"; attention: torch, heads folded ({failed}, {old}); " in chosen
    assert "only supports Ampere" in caplog.text


def test_why_not_is_said_once() -> None:
    chosen = str(choose(CONFIG, CPU, torch.bfloat16))
    assert "; attention: torch (no CUDA); attention by mask: torch (no CUDA); " in chosen


def test_fp32_is_left_to_torch() -> None:
    candidates = choice._Candidates(CONFIG, torch.device("cuda"), torch.float32, "auto", FlashStandIns().load)
    for candidate in (candidates.flash_attn, candidates.varlen_attn):
        with pytest.raises(choice._Declined, match="a model that is not bfloat16"):
            candidate(attend)


def test_training_keeps_the_plain_paths_bits() -> None:
    model = golden(MODELS[0])
    tokens_RL = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    states = FromNothing(model.checkpoint.config, *tokens_RL.shape, CPU)
    assert torch.equal(through(_unused, model.context)(tokens_RL, states), model.context(tokens_RL, states))
