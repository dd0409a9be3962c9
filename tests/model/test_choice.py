"""Which kernel computes what, and why: each part by itself, as a GPU would meet them, over stand-ins on the CPU."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.flash_stand_ins import FlashStandIns
from tests.goldens import CPU
from tests.mamba_stand_ins import MambaStandIns
from twotower.config import ModelConfig
from twotower.errors import ConfigError
from twotower.model import mamba
from twotower.model.attention import attend
from twotower.model.kernels import Kernels, choice, choose, parity
from twotower.model.kernels.folded_attention import attend_folded

CONFIG = ModelConfig(
    hybrid_override_pattern="M*",
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=4,
    mamba_head_dim=16,
    n_groups=2,
    ssm_state_size=16,
    chunk_size=64,
)
# Each part with the package that computes it, its module and the function in it.
PARTS = {
    "convolution": ("causal_conv1d", "causal_conv1d", "causal_conv1d_fn"),
    "scan": ("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
    "step": ("mamba_ssm", "mamba_ssm.ops.triton.selective_state_update", "selective_state_update"),
    "attention": ("flash_attn", "flash_attn", "flash_attn_with_kvcache"),
}
PLAIN = {"convolution": "torch", "scan": "torch", "step": "torch", "attention": "torch, heads folded"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fewer keys to compare over: what is compared has tests of its own."""
    monkeypatch.setattr(parity, "_CACHED", (37,))
    with torch.inference_mode():
        yield


class Modules:
    """All packages as stand-ins, one function of which may be spoilt: `spoil` gives another for it, or raises."""

    def __init__(self, part: str | None = None, spoil: Callable[[Any], Any] | None = None) -> None:
        self.spoilt, self.spoil = PARTS[part][1:] if part else ("", ""), spoil
        self.stand_ins = (MambaStandIns(), FlashStandIns())

    def load(self, name: str) -> ModuleType:
        if name == "torch.nn.attention.varlen":
            raise ModuleNotFoundError(f"No module named {name!r}")
        module = self.stand_ins[name == "flash_attn"].load(name)
        spoilt, function = self.spoilt
        if self.spoil is not None and name == spoilt:
            module.__dict__[function] = self.spoil(module.__dict__[function])
        return module


def _choose_as_on_cuda(monkeypatch: pytest.MonkeyPatch, load: Callable[[str], ModuleType]) -> Kernels:
    monkeypatch.setattr(choice._Candidates, "_allowed", lambda self, bfloat16_only: None)
    return choose(CONFIG, CPU, torch.bfloat16, load=load)


def _implementations(kernels: Kernels) -> dict[str, str]:
    return {how.part: how.implementation for how in kernels.choices if how.part in PARTS}


def _missing(function: Any) -> Any:
    raise ModuleNotFoundError("No module named 'cuda_part'")


def _not_importable(function: Any) -> Any:
    raise ImportError("undefined symbol: _ZN3c10\nand so on")


def _failing(function: Any) -> Any:
    def fails(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no kernel image is available")

    return fails


def _differing(function: Any) -> Any:
    def differs(*args: object, **more: object) -> Any:
        found = function(*args, **more)
        return tuple(part * 1.1 for part in found) if isinstance(found, tuple) else found * 1.1

    return differs


def _of_another_release(function: Any) -> Any:
    def renamed(*, other: object) -> Tensor:
        raise AssertionError("cannot be called as ours calls it")

    return renamed


WAYS: dict[Callable[[Any], Any], str] = {
    _missing: "No module named 'cuda_part'",
    _not_importable: "{package} failed: ImportError: undefined symbol: _ZN3c10",
    _failing: "{package} failed: RuntimeError: no kernel image is available",
    _differing: "{package} differs from torch by ",
    _of_another_release: "{package} failed: TypeError: ",
}


def test_all_that_is_importable_and_agrees_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _choose_as_on_cuda(monkeypatch, Modules().load)
    assert _implementations(kernels) == {part: package for part, (package, *_) in PARTS.items()}
    for part, (package, *_) in PARTS.items():
        assert f"{part}: {package} (agrees with torch here)" in str(kernels)
    assert "attention by mask: torch, heads folded (agrees with torch here)" in str(kernels)


@pytest.mark.parametrize("spoil", WAYS, ids=lambda way: way.__name__[1:])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.slow
def test_a_declined_kernel_takes_no_other_with_it(
    part: str, spoil: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = _choose_as_on_cuda(monkeypatch, Modules(part, spoil).load)
    wanted = {name: PLAIN[name] if name == part else package for name, (package, *_) in PARTS.items()}
    assert _implementations(kernels) == wanted
    why = next(how.reason for how in kernels.choices if how.part == part)
    assert WAYS[spoil].format(package=PARTS[part][0]) in why
    assert "\n" not in str(kernels)
    assert (f"{part}: {PARTS[part][0]} " in caplog.text) == (spoil is not _missing), "loud, but where it is not there"


def test_a_package_without_the_function_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = _choose_as_on_cuda(monkeypatch, lambda name: ModuleType(name))
    assert (kernels.mamba, kernels.attend) == (mamba.PLAIN, attend_folded)
    for part, (package, _, function) in PARTS.items():
        why = next(how.reason for how in kernels.choices if how.part == part)
        assert f"{package} failed: AttributeError: " in why and function in why


def test_attention_of_heads_that_no_kernel_takes_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for head_dim in (12, 264):
        monkeypatch.setattr(choice._Candidates, "_allowed", lambda self, bfloat16_only: None)
        kernels = choose(replace(CONFIG, head_dim=head_dim), CPU, torch.bfloat16, load=Modules().load)
        assert kernels.attend is attend_folded
        wanted = f"flash attention wants heads of a multiple of 8, at most 256, the model has {head_dim}"
        assert f"attention: torch, heads folded ({wanted}" in str(kernels)


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "waits"),
    [
        ("cpu", torch.float32, None, False),
        ("cuda:0", torch.float32, (9, 0), True),
        ("cuda:0", torch.bfloat16, (8, 0), True),
        ("cuda:0", torch.bfloat16, (9, 0), False),
        ("cuda:0", torch.bfloat16, (10, 3), False),
        ("cuda:0", torch.bfloat16, (12, 0), True),
    ],
)
def test_experts_that_make_the_host_wait_say_so(
    device: str, dtype: torch.dtype, capability: tuple[int, int], waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch has a kernel of grouped products in bf16, for two kinds of GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert ("makes the host wait" in choice._experts(torch.device(device), dtype).reason) == waits


def test_on_a_cpu_everything_is_torch_and_says_why() -> None:
    kernels = choose(CONFIG, CPU, torch.float32)
    assert (kernels.mamba, kernels.attend) == (mamba.PLAIN, attend)
    wanted = "convolution: torch (no CUDA); scan: torch (no CUDA); step: torch (no CUDA); attention: torch (no CUDA); "
    assert str(kernels).startswith(wanted)


def test_torch_can_be_forced_and_nothing_else() -> None:
    assert "scan: torch (asked for); step: torch (asked for)" in str(choose(CONFIG, CPU, torch.float32, "torch"))
    with pytest.raises(ConfigError, match="kernels: got 'triton', wanted one of auto, torch"):
        choose(CONFIG, CPU, torch.float32, "triton")
