"""Devices with their makers' published figures, and a plan's other assumptions. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.errors import ConfigError

GB, TB, TFLOP = 10**9, 10**12, 10**12
BLOCK = 16
ROUTINGS = ("uniform", "demo")  # what experts are touched by (`planner/routing.py`)


@dataclass(frozen=True, slots=True)
class Device:
    """`memory` in bytes; `bandwidth` and `link` (one way, to another device of the node) in bytes a second; `bf16` in
    dense operations a second with fp32 sums, `fp32` in those of the plain cores. `source` is the maker's document.
    """

    name: str
    memory: int
    bandwidth: float
    bf16: float
    fp32: float
    link: float
    source: str


@dataclass(frozen=True, slots=True)
class Assumed:
    """Assumptions beyond the architecture. `tokens_per_step` is diffusion's; `tokens_per_round` and `draft_steps` are
    those of verified. `reached` is the share of the bandwidth that kernels reach, and `kept_free` the share of the
    memory that is kept free. `ssm_wire_dtype` is the dtype in which Mamba states are sent to a denoiser.
    """

    tokens_per_step: float = 2.85
    tokens_per_round: float = 8.0
    draft_steps: float = 2.0
    reached: float = 0.85
    kept_free: float = 0.05
    ssm_wire_dtype: str = "float32"


_ALL = (
    Device("h100", 80 * GB, 3.35 * TB, 989 * TFLOP, 67 * TFLOP, 450 * GB, "NVIDIA H100 data sheet, SXM"),
    Device("h200", 141 * GB, 4.8 * TB, 989 * TFLOP, 67 * TFLOP, 450 * GB, "NVIDIA H200 data sheet, SXM"),
    Device(
        "h100-pcie",
        80 * GB,
        2.0 * TB,
        756 * TFLOP,
        51 * TFLOP,
        64 * GB,
        "NVIDIA H100 data sheet and product brief PB-11133, PCIe; the link is PCIe 5 x16, a bridge brings 300 GB/s",
    ),
    Device(
        "h100-nvl",
        94 * GB,
        3.9 * TB,
        835 * TFLOP,
        60 * TFLOP,
        300 * GB,
        "NVIDIA H100 data sheet, NVL; the link is a bridge between two",
    ),
    Device("b200", 180 * GB, 7.7 * TB, 2250 * TFLOP, 75 * TFLOP, 900 * GB, "NVIDIA HGX B200 data sheet, one of eight"),
    Device(
        "rtx-pro-6000",
        96 * GB,
        1.792 * TB,
        503.8 * TFLOP,
        126 * TFLOP,
        64 * GB,
        "NVIDIA RTX Blackwell PRO architecture paper; the link is PCIe 5 x16",
    ),
    Device(
        "rtx-4090",
        24 * GB,
        1.008 * TB,
        165.2 * TFLOP,
        82.6 * TFLOP,
        32 * GB,
        "NVIDIA Ada architecture paper; the link is PCIe 4 x16",
    ),
)
DEVICES = {device.name: device for device in _ALL}


def device_named(name: str) -> Device:
    """Raises ConfigError."""
    if name not in DEVICES:
        raise ConfigError(f"device: got {name!r}, wanted one of {', '.join(DEVICES)}")
    return DEVICES[name]
