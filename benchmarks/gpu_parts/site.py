"""Where a run measures, at which size, and how it takes times."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from twotower.config import ModelConfig
from twotower.engine.in_process import pick_device
from twotower.errors import ConfigError
from twotower.planner.released import RELEASED

FULL = RELEASED
TINY = replace(
    FULL,
    hybrid_override_pattern="MEM*EM",
    vocab_size=256,
    hidden_size=64,
    num_attention_heads=4,
    head_dim=16,
    mamba_num_heads=4,
    mamba_head_dim=16,
    n_groups=2,
    ssm_state_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=24,
)


@dataclass(frozen=True)
class Site:
    """A device and sizes. `cached` tokens are behind every row of a measured pass."""

    device: torch.device
    tiny: bool
    batches: tuple[int, ...] = (1, 4, 16, 64)
    cached: int = 1024
    repetitions: int = 20
    bandwidth_bytes: int = 4 << 30
    exchange_rows: tuple[int, ...] = (1, 4, 16)
    exchange_rounds: int = 5

    @property
    def config(self) -> ModelConfig:
        return TINY if self.tiny else FULL

    @classmethod
    def of(cls, device: str, tiny: bool, batches: tuple[int, ...] | None) -> "Site":
        """Raises ValueError where the device is not there."""
        try:
            site = cls(pick_device(("cpu" if tiny else "cuda") if device == "auto" else device), tiny)
        except ConfigError as error:
            raise ValueError(f"{error}; --tiny runs on the CPU") from None
        if tiny:
            site = replace(
                site, batches=(1, 3), cached=40, repetitions=2, bandwidth_bytes=1 << 20, exchange_rows=(1, 3)
            )
        return replace(site, batches=batches or site.batches)

    def seconds(self, run: Callable[[], object], warm_up: int = 2) -> float:
        """Median time of a call: of the device's work and of whatever it waits for."""
        for _ in range(warm_up):
            run()
        if self.device.type != "cuda":
            return statistics.median(_wall_s(run) for _ in range(self.repetitions))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(self.repetitions + 1)]
        torch.cuda.synchronize(self.device)
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(begin.elapsed_time(end) for begin, end in pairwise(marks)) / 1000

    def bandwidth(self) -> float:
        """Bytes a second that a device-to-device copy moves, read and written ones counted."""
        source = torch.zeros(self.bandwidth_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * self.bandwidth_bytes / self.seconds(lambda: target.copy_(source))

    def peak_gib(self) -> float:
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else float("nan")


def _wall_s(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
