"""A router's report of itself to other routers and to the page. It is a message, so that different
versions get along.
"""

from dataclasses import dataclass, field

from cluster.board.cells_seen import CellRow, GoneRow
from cluster.board.history import Told
from cluster.board.runs_seen import RunRow
from twotower.core import Mode
from twotower.transport.codec import Codec


@dataclass(frozen=True, slots=True)
class Deployed:
    """A router's deployment. `settings`: a digest, equal for all routers of one deployment."""

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
    """A router now. `open`: requests that it holds, of `capacity`; `waiting`: requests without a turn on the cells, the
    first one for `longest_wait_s`. `up_s`: time since its start. `faults`: why changed files cannot be taken.
    """

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
    """A router: its requests (`more`: the number not shown), the cells it hears, and the histories it knows, by router.
    These are its own and earlier routers'. `at`: seconds since the epoch.
    """

    at: float
    router: RouterRow
    runs: tuple[RunRow, ...] = ()
    more: int = 0
    cells: tuple[CellRow, ...] = ()
    gone: tuple[GoneRow, ...] = ()
    histories: dict[str, Told] = field(default_factory=dict)


CODEC: Codec[Part] = Codec(Part)
