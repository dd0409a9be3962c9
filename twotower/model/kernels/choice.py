"""Picking implementations for a tower's device and dtype; saying which and why.

fp32 models take the plain path for their Mamba layers: they are the reference, and the fused products are TF32. For
attention they may fold heads, no more: flash-attn computes in 16 bits only.
"""

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch

from twotower.config import ModelConfig
from twotower.errors import ConfigError
from twotower.model import mamba
from twotower.model.attention import Attend, Attention, attend
from twotower.model.kernels import flash_attention, fused_mamba, parity
from twotower.model.kernels.flash_attention import ByNumber
from twotower.model.kernels.folded_attention import attend_folded
from twotower.model.mamba import Convolve, MambaKernels, MambaMixer
from twotower.model.tower import Tower

logger = logging.getLogger(__name__)

WANTED = ("auto", "torch")
_Kernel = TypeVar("_Kernel")


@dataclass(frozen=True, slots=True)
class Choice:
    """What computes one part, and why that."""

    part: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.part}: {self.implementation} ({self.reason})"


@dataclass(frozen=True)
class Kernels:
    """A tower's kernels, and how they were chosen."""

    mamba: MambaKernels
    attend: Attend
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.choices))


class _Declined(Exception):
    """Why a replacement is not taken."""


@torch.inference_mode()
def choose(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    wanted: str = "auto",
    load: Callable[[str], ModuleType] = importlib.import_module,
) -> Kernels:
    """The kernels for a tower of this shape. `torch` forces the plain path. Raises ConfigError."""
    if wanted not in WANTED:
        raise ConfigError(f"kernels: got {wanted!r}, wanted one of {', '.join(WANTED)}")
    candidates = _Candidates(config, device, dtype, wanted, load)
    plain: tuple[Convolve, Attend] = mamba.convolve, attend
    convolve, how_convolution = _first("convolution", {"causal_conv1d": candidates.convolution}, plain[0])
    scans, how_scan = _first("scan and step", {"mamba_ssm": candidates.scan_and_step}, mamba.PLAIN)
    masked, how_masked = _first("attention by mask", {"torch, heads folded": candidates.folded}, plain[1])
    by_number = {
        "flash_attn": lambda: candidates.flash_attn(masked),
        "torch varlen_attn": lambda: candidates.varlen_attn(masked),
    }
    attention, how_attention = _first("attention", by_number, masked, how_masked.implementation)
    choices = (how_convolution, how_scan, how_attention, how_masked, _experts(device, dtype))
    return Kernels(MambaKernels(convolve, scans.scan, scans.step), attention, choices)


def install(tower: Tower, kernels: Kernels) -> None:
    """Make a tower compute with these. Says so in the log."""
    for module in tower.modules():
        if isinstance(module, MambaMixer):
            module.kernels = kernels.mamba
        elif isinstance(module, Attention):
            module.attend = kernels.attend
    tower.kernels = str(kernels)
    logger.info("%s kernels: %s", type(tower).__name__, kernels)


def describe(tower: Tower) -> str:
    """Which implementations a tower computes with, and why."""
    return tower.kernels


@dataclass(frozen=True)
class _Candidates:
    """What could replace the plain functions. Each method raises _Declined where it does not."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    wanted: str
    load: Callable[[str], ModuleType]

    def convolution(self) -> Convolve:
        self._allowed(bfloat16_only=True)
        module = self._module("causal_conv1d")
        problem = fused_mamba.convolution_misfit(self.config.conv_channels, self.config.conv_kernel)
        if problem is not None:
            raise _Declined(f"causal_conv1d: {problem}")
        convolve = fused_mamba.convolution(module)
        self._agrees("causal_conv1d", MambaKernels(convolve, mamba.scan, mamba.step))
        return convolve

    def scan_and_step(self) -> MambaKernels:
        self._allowed(bfloat16_only=True)
        combined = self._module("mamba_ssm.ops.triton.ssd_combined")
        selective = self._module("mamba_ssm.ops.triton.selective_state_update")
        kernels = fused_mamba.scan_and_step(combined, selective)
        self._agrees("mamba_ssm", kernels)
        return kernels

    def flash_attn(self, masked: Attend) -> Attend:
        self._allowed(bfloat16_only=True)
        return self._by_number("flash_attn", flash_attention.flash_attn(self._module("flash_attn")), masked)

    def varlen_attn(self, masked: Attend) -> Attend:
        self._allowed(bfloat16_only=True)
        module = self._module("torch.nn.attention.varlen")
        problem = flash_attention.varlen_misfit(module)
        if problem is not None:
            raise _Declined(problem)
        return self._by_number("varlen_attn", flash_attention.varlen_attn(module), masked)

    def _by_number(self, name: str, kernel: ByNumber, masked: Attend) -> Attend:
        attention = flash_attention.attention(kernel, masked)
        self._attends(name, attention)
        return attention

    def folded(self) -> Attend:
        self._allowed(bfloat16_only=False)
        if self.config.num_attention_heads == self.config.num_key_value_heads:
            raise _Declined("no grouped heads to fold")
        self._attends("folded attention", attend_folded)
        return attend_folded

    def _attends(self, name: str, attention: Attend) -> None:
        _check(name, lambda: parity.attention_deviations(attention, self.config, self.device, self.dtype))

    def _agrees(self, name: str, kernels: MambaKernels) -> None:
        _check(name, lambda: parity.mamba_deviations(kernels, self.config, self.device))

    def _allowed(self, bfloat16_only: bool) -> None:
        if self.wanted == "torch":
            raise _Declined("asked for")
        if self.device.type != "cuda":
            raise _Declined("no CUDA")
        if bfloat16_only and self.dtype is not torch.bfloat16:
            raise _Declined("a model that is not bfloat16")

    def _module(self, name: str) -> Any:
        package = name.partition(".")[0]
        try:
            return self.load(name)
        except ModuleNotFoundError as error:
            raise _Declined(str(error)) from error
        except Exception as error:  # a package built for another torch fails in many ways
            logger.warning("%s is installed but cannot be imported", package, exc_info=True)
            raise _Declined(f"{package} is installed but broken: {type(error).__name__}") from error


def _first(
    part: str, candidates: Mapping[str, Callable[[], _Kernel]], plain: _Kernel, plain_name: str = "torch"
) -> tuple[_Kernel, Choice]:
    """The first candidate that is not declined. The reason given includes why those before it were."""
    declined: list[str] = []
    for name, build in candidates.items():
        try:
            return build(), Choice(part, name, ", ".join(["agrees with torch here", *declined]))
        except _Declined as why:
            declined.append(str(why))
    return plain, Choice(part, plain_name, ", ".join(dict.fromkeys(declined)))


def _check(name: str, deviations: Callable[[], Iterable[tuple[str, float]]]) -> None:
    """Run it once on this device. A kernel that fails or differs is declined, loudly."""
    try:
        case, worst = max(deviations(), key=lambda deviation: deviation[1])
    except Exception as error:
        logger.warning("%s does not run here", name, exc_info=True)
        raise _Declined(f"{name} failed: {type(error).__name__}") from error
    if worst > parity.TOLERANCE:
        logger.warning("%s differs from torch by %.1e of the largest value in %s", name, worst, case)
        raise _Declined(f"{name} differs from torch by {worst:.1e} in {case}")


def _experts(device: torch.device, dtype: torch.dtype) -> Choice:
    fp32_on_gpu = device.type == "cuda" and dtype is not torch.bfloat16
    reason = "in this dtype a loop that makes the host wait" if fp32_on_gpu else "nothing else to choose"
    return Choice("experts", "torch grouped_mm", reason)
