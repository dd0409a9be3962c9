"""Picking implementations for a tower's device and dtype; saying which and why.

Each part is chosen by itself: declining a kernel declines no other kernel of the same package.

In fp32 models the Mamba layers take the plain path: fp32 is the reference, and the fused products are TF32. For
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
from twotower.model.attention import Attend, AttendInPages, Attention, attend
from twotower.model.kernels import flash_attention, fused_mamba, paged_attention, parity
from twotower.model.kernels.folded_attention import attend_folded
from twotower.model.mamba import Convolve, MambaKernels, MambaMixer, Scan, Step
from twotower.model.moe import grouped_products_wait
from twotower.model.quantised import GroupedProduct, QuantisedExperts, plain_product
from twotower.model.tower import Tower

logger = logging.getLogger(__name__)

WANTED = ("auto", "torch")
_Kernel = TypeVar("_Kernel")
_Build = Callable[[], _Kernel]
_Deviations = Callable[[_Kernel], Iterable[tuple[str, float]]]


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
    product: GroupedProduct = plain_product
    wanted: str = WANTED[0]
    attend_in_pages: AttendInPages | None = None

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
    mixer, how_mixer = _choose_mixer(candidates)
    attention, how_attention = _choose_attention(candidates)
    in_pages, how_in_pages = _choose_in_pages(candidates)
    product, how_experts = _choose_product(candidates)
    how = (*how_mixer, *how_attention, how_in_pages, how_experts)
    return Kernels(mixer, attention, how, product, wanted, in_pages)


def install(tower: Tower, kernels: Kernels) -> None:
    """Make a tower compute with these. Says so in the log."""
    for module in tower.modules():
        if isinstance(module, MambaMixer):
            module.kernels = kernels.mamba
        elif isinstance(module, Attention):
            module.attend, module.attend_in_pages = kernels.attend, kernels.attend_in_pages
        elif isinstance(module, QuantisedExperts):
            module.product = kernels.product
    tower.kernels, tower.plain_only = str(kernels), kernels.wanted == "torch"
    logger.info("%s kernels: %s", type(tower).__name__, kernels)


def describe(tower: Tower) -> str:
    """Which implementations a tower computes with, and why."""
    return tower.kernels


@dataclass(frozen=True)
class _Candidates:
    """What could replace the plain functions. Methods raise where it cannot: _Declined where that is no surprise."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    wanted: str
    load: Callable[[str], ModuleType]

    def convolution(self) -> Convolve:
        self._allowed(bfloat16_only=True)
        module = self._module("causal_conv1d")
        _fits(fused_mamba.convolution_misfit(self.config.conv_channels, self.config.conv_kernel))
        return fused_mamba.convolution(module)

    def scan(self) -> Scan:
        self._allowed(bfloat16_only=True)
        return fused_mamba.scan(self._module("mamba_ssm.ops.triton.ssd_combined"))

    def step(self) -> Step:
        self._allowed(bfloat16_only=True)
        return fused_mamba.step(self._module("mamba_ssm.ops.triton.selective_state_update"))

    def paged_flash_attn(self) -> AttendInPages:
        self._allowed(bfloat16_only=True)
        module = self._module("flash_attn")
        _fits(paged_attention.flash_misfit(module) or flash_attention.heads_misfit(self.config.head_dim))
        return paged_attention.attention(paged_attention.flash_attn(module))

    def paged_varlen_attn(self) -> AttendInPages:
        self._allowed(bfloat16_only=True)
        module = self._module("torch.nn.attention.varlen")
        _fits(paged_attention.varlen_misfit(module) or flash_attention.heads_misfit(self.config.head_dim))
        return paged_attention.attention(paged_attention.varlen_attn(module))

    def flash_attn(self, masked: Attend) -> Attend:
        self._allowed(bfloat16_only=True)
        module = self._module("flash_attn")
        _fits(flash_attention.heads_misfit(self.config.head_dim))
        return flash_attention.attention(flash_attention.flash_attn(module), masked)

    def varlen_attn(self, masked: Attend) -> Attend:
        self._allowed(bfloat16_only=True)
        module = self._module("torch.nn.attention.varlen")
        _fits(flash_attention.varlen_misfit(module) or flash_attention.heads_misfit(self.config.head_dim))
        return flash_attention.attention(flash_attention.varlen_attn(module), masked)

    def folded(self) -> Attend:
        self._allowed(bfloat16_only=False)
        if self.config.num_attention_heads == self.config.num_key_value_heads:
            raise _Declined("no grouped heads to fold")
        return attend_folded

    def product(self) -> GroupedProduct:
        self._allowed(bfloat16_only=True)
        product: GroupedProduct = self._module("twotower.model.kernels.quantised_product").product
        return product

    def _allowed(self, bfloat16_only: bool) -> None:
        if self.wanted == "torch":
            raise _Declined("asked for")
        if self.device.type != "cuda":
            raise _Declined("no CUDA")
        if bfloat16_only and self.dtype is not torch.bfloat16:
            raise _Declined("a model that is not bfloat16")

    def _module(self, name: str) -> Any:
        try:
            return self.load(name)
        except ModuleNotFoundError as error:
            raise _Declined(str(error)) from error


def _choose_mixer(candidates: _Candidates) -> tuple[MambaKernels, tuple[Choice, ...]]:
    config, device, plain = candidates.config, candidates.device, mamba.PLAIN
    convolve, how_convolution = _first(
        "convolution",
        {"causal_conv1d": candidates.convolution},
        lambda kernel: parity.convolution_deviations(kernel, config, device),
        plain.convolve,
    )
    scan, how_scan = _first(
        "scan",
        {"mamba_ssm": candidates.scan},
        lambda kernel: parity.scan_deviations(kernel, config, device),
        plain.scan,
    )
    step, how_step = _first(
        "step",
        {"mamba_ssm": candidates.step},
        lambda kernel: parity.step_deviations(kernel, config, device),
        plain.step,
    )
    return MambaKernels(convolve, scan, step), (how_convolution, how_scan, how_step)


def _choose_attention(candidates: _Candidates) -> tuple[Attend, tuple[Choice, ...]]:
    def deviations(kernel: Attend) -> Iterable[tuple[str, float]]:
        return parity.attention_deviations(kernel, candidates.config, candidates.device, candidates.dtype)

    plain: Attend = attend
    masked, how_masked = _first("attention by mask", {"torch, heads folded": candidates.folded}, deviations, plain)
    by_number: dict[str, _Build[Attend]] = {
        "flash_attn": lambda: candidates.flash_attn(masked),
        "torch varlen_attn": lambda: candidates.varlen_attn(masked),
    }
    attention, how = _first("attention", by_number, deviations, masked, how_masked.implementation)
    return attention, (how, how_masked)


def _choose_in_pages(candidates: _Candidates) -> tuple[AttendInPages | None, Choice]:
    """Choose a kernel that reads pages in place. Without one, pages are gathered."""

    def deviations(kernel: AttendInPages | None) -> Iterable[tuple[str, float]]:
        assert kernel is not None
        return parity.paged_deviations(kernel, candidates.config, candidates.device, candidates.dtype)

    by_table: dict[str, _Build[AttendInPages | None]] = {
        "flash_attn": candidates.paged_flash_attn,
        "torch varlen_attn": candidates.paged_varlen_attn,
    }
    wide = parity.PAGED_TOLERANCE
    return _first("attention in pages", by_table, deviations, None, "none, pages are gathered", wide)


def _choose_product(candidates: _Candidates) -> tuple[GroupedProduct, Choice]:
    config, device, dtype = candidates.config, candidates.device, candidates.dtype
    if config.experts is None:
        return plain_product, _experts(device, dtype)
    return _first(
        "experts",
        {"triton": candidates.product},
        lambda kernel: parity.product_deviations(kernel, config, device, dtype),
        plain_product,
        f"torch, {config.experts.word} unpacked expert by expert",
    )


def _first(
    part: str,
    candidates: Mapping[str, _Build[_Kernel]],
    deviations: _Deviations[_Kernel],
    plain: _Kernel,
    plain_name: str = "torch",
    tolerance: float = parity.TOLERANCE,
) -> tuple[_Kernel, Choice]:
    """The first candidate that agrees with torch on this device. The reason given includes why those before it do not.

    One that cannot be built, fails or differs is declined loudly.
    """
    declined: list[str] = []
    for name, build in candidates.items():
        try:
            kernel = build()
            _hold(deviations(kernel), part, name, tolerance)
        except _Declined as why:
            declined.append(str(why))
        except Exception as error:  # a package built for another torch or GPU fails in many ways
            logger.warning("%s: %s does not run here", part, name, exc_info=True)
            said = str(error).partition("\n")[0]
            declined.append(f"{name} failed: {type(error).__name__}{said and ': '}{said}")
        else:
            return kernel, Choice(part, name, ", ".join(["agrees with torch here", *declined]))
    return plain, Choice(part, plain_name, ", ".join(dict.fromkeys(declined)))


def _fits(misfit: str | None) -> None:
    if misfit is not None:
        raise _Declined(misfit)


def _hold(deviations: Iterable[tuple[str, float]], part: str, name: str, tolerance: float) -> None:
    """Run it once on this device, and compare."""
    case, worst = max(deviations, key=lambda deviation: deviation[1])
    if worst > tolerance:
        logger.warning("%s: %s differs from torch by %.1e of the largest value in %s", part, name, worst, case)
        raise _Declined(f"{name} differs from torch by {worst:.1e} in {case}")


def _experts(device: torch.device, dtype: torch.dtype) -> Choice:
    waits = grouped_products_wait(device, dtype)
    reason = "with this dtype and GPU a loop that makes the host wait" if waits else "nothing else to choose"
    return Choice("experts", "torch grouped_mm", reason)
