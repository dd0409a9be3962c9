"""Forwards that have been launched, and the one moment in a tick when the host waits for their outcomes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Rows = list[list[float]]
Taken = TypeVar("Taken")


@dataclass(frozen=True, slots=True)
class Step(Generic[Taken]):
    """`outcome`: rows of fp32 numbers, still on the device. `take` gets them on the host."""

    outcome: Tensor
    take: Callable[[Rows], Taken]


def clock_for(device: torch.device) -> Callable[[], float]:
    """A clock for a pass, read before it and once the host knows its outcome. On a CPU it is the thread's own time,
    because the machine's other work does not belong to the pass.
    """
    return time.thread_time if device.type == "cpu" else time.perf_counter


def take_all(steps: Sequence[Step[Taken]]) -> list[Taken]:
    """Wait for the device once, however many steps there are; then each takes its outcome, in order."""
    return [step.take(rows) for step, rows in zip(steps, _to_host([step.outcome for step in steps]), strict=True)]


def _to_host(outcomes: Sequence[Tensor]) -> list[Rows]:
    """All of them in one transfer."""
    if len(outcomes) <= 1:
        return [outcome.tolist() for outcome in outcomes]
    flat = torch.cat([outcome.flatten() for outcome in outcomes]).tolist()
    rows, end = [], 0
    for outcome in outcomes:
        start, width = end, outcome.shape[1]
        end += outcome.numel()
        rows.append([flat[i : i + width] for i in range(start, end, width)])
    return rows
