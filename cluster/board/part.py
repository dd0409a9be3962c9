"""What one router tells another, and the page, of itself: a message, so that versions that differ do not trip."""

from dataclasses import dataclass, field

from cluster.board.cells_seen import CellRow, GoneRow
from cluster.board.history import Told
from cluster.board.runs_seen import RunRow
from twotower.core import Mode
from twotower.transport.codec import Codec


@dataclass(frozen=True, slots=True)
class Deployed:
    """What a router was started with. `settings`: a digest; routers of one deployment have the same."""

    model: str
    fingerprint: str
    version: str
    settings: str
    modes: tuple[Mode, ...]
    min_cells: int
    max_cells: int
    routers: int


@dataclass(frozen=True, slots=True)
class RouterRow:
    """A router now. `open`: requests under way in it, of `capacity`; `waiting`: those without a turn on the cells, the
    first for `longest_wait_s`. `up_s`: since it was started. `faults`: why changed files of its cannot be taken."""

    name: str
    node: str
    deployed: Deployed
    up_s: float
    ready: bool
    drains: bool
    open: int
    capacity: int
    waiting: int
    longest_wait_s: float
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """A router, the requests it holds (`more`: beside those shown), the cells it hears, and the histories it knows: its
    own and those of routers that went before, by their names. `at`: seconds since the epoch."""

    at: float
    router: RouterRow
    runs: tuple[RunRow, ...] = ()
    more: int = 0
    cells: tuple[CellRow, ...] = ()
    gone: tuple[GoneRow, ...] = ()
    histories: dict[str, Told] = field(default_factory=dict)


CODEC: Codec[Part] = Codec(Part)
