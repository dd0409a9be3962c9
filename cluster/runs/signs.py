"""The state of a cell and its towers in each beat: plain numbers, nothing of any request."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TowerSign:
    """One tower of a cell. `busy`, `commit_wait`, `prompt_wait`: shares, 0 to 1, of the time between the last two
    answers of its process. The waits are times in which a denoiser had sequences and stepped none.

    `answers`: whether it has answered lately; if not, numbers are 0. `process`: its process id; two towers may share
    one process. `exchange_rate`: bytes of cache deltas received a second. `free_memory`: bytes that the device has left
    for the process, if the system says. `memory`: the process's allocations, in words.
    """

    name: str
    process: int
    device: str
    answers: bool
    busy: float = 0.0
    commit_wait: float = 0.0
    prompt_wait: float = 0.0
    sequences: int = 0
    slots: int = 0
    free_slots: int = 0
    pages: int = 0
    free_pages: int = 0
    exchange_rate: float = 0.0
    free_memory: int | None = None
    memory: str = ""


@dataclass(frozen=True, slots=True)
class CellSign:
    """A cell. `mending_s`: how long it has been replacing a lost tower; 0 while it is whole. `mended`: how often it has
    done so.
    """

    node: str
    placement: str
    mending_s: float
    mended: int
    towers: tuple[TowerSign, ...] = ()
