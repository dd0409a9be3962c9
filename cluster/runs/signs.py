"""How a cell and its towers are, as the cell says with each beat: plain numbers, nothing of any request."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TowerSign:
    """One tower of a cell. `busy`, `commit_wait`, `prompt_wait`: shares of the time between the last two answers of its
    process, 0 to 1; the waits are a denoiser's, which had sequences and stepped none.

    `answers`: whether it has answered lately; where it has not, numbers are 0. `process`: its id, and that of the
    other tower where both share one. `exchange_rate`: bytes of cache deltas received a second. `free_memory`: bytes
    that the device has left for the process, where the system says. `memory`: what the process allocates, in words.
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
    """A cell. `mending_s`: for how long it has been mending; 0 while it is whole. `mended`: how often it has."""

    node: str
    placement: str
    mending_s: float
    mended: int
    towers: tuple[TowerSign, ...] = ()
