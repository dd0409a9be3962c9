"""The real mamba-ssm, causal-conv1d and flash-attn, without a GPU. Import this before anything imports Triton.

mamba-ssm's Triton kernels run under Triton's interpreter. The other two are their own Python over stand-ins for what
they have compiled.
"""

import contextlib
import importlib
import importlib.util
import math
import os
import sys
from types import ModuleType
from typing import Any

import torch

from tests.flash_stand_ins import FlashStandIns
from tests.mamba_stand_ins import causal_conv1d_fwd

assert "triton" not in sys.modules, "Triton was imported before its interpreter was asked for"
os.environ["TRITON_INTERPRET"] = "1"

import triton.runtime.autotuner as autotuner  # noqa: E402


class LargestBlocks(autotuner.Autotuner):  # type: ignore[misc]
    """Without a GPU there is nothing to time: the configuration with the largest blocks, and so the fewest, serves."""

    def __init__(self, fn: Any, names: Any, configs: list[Any], *rest: Any, **more: Any) -> None:
        largest = max(configs, key=lambda config: math.prod(config.kwargs.values()))
        super().__init__(fn, names, [largest], *rest, **more)


class CompiledAttention(ModuleType):
    """flash-attn's compiled part. Counts the calls, and takes fp32 where `any_dtype`."""

    def __init__(self) -> None:
        super().__init__("flash_attn_2_cuda")
        self.stand_ins = FlashStandIns()

    def fwd_kvcache(self, *args: Any) -> Any:
        return self.stand_ins.fwd_kvcache(*args)


class CompiledConvolution(ModuleType):
    """causal-conv1d's compiled part."""

    def __init__(self) -> None:
        super().__init__("causal_conv1d_cuda")
        self.calls = 0

    def causal_conv1d_fwd(self, *args: Any) -> None:
        self.calls += 1
        causal_conv1d_fwd(*args)


ATTENTION, CONVOLUTION = CompiledAttention(), CompiledConvolution()


def load(name: str) -> ModuleType:
    """As `importlib.import_module`, of the packages that the kernels come from."""
    return importlib.import_module(name)


def _prepare() -> None:
    autotuner.Autotuner = LargestBlocks
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment,misc]  # launchers enter it
    # The package's __init__ imports its CUDA extension; its Triton part needs none.
    package = ModuleType("mamba_ssm")
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None and spec.submodule_search_locations is not None
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["mamba_ssm"] = package
    for part in (ATTENTION, CONVOLUTION):
        sys.modules[part.__name__] = part


_prepare()
