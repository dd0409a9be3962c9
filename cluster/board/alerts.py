"""What an operator must act on or should know, the most important first; empty if all is well."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.board.cells_seen import CellRow, GoneRow
from cluster.board.history import Event
from cluster.board.part import Part
from twotower.core import Mode

LONG_WAIT_S = 5.0
_STARTS_S = 3.0  # seconds in which a new router may not know everything yet
_LOADS_S = 120.0  # seconds in which a cell may still be reading its weights
_LATELY_S = 60
_REASONS = 5  # alerts that are shown


class Level(StrEnum):
    """`ACT`: requests fail or soon will. `WATCH`: the service mends itself, or lacks something."""

    ACT = "act"
    WATCH = "watch"


@dataclass(frozen=True, slots=True)
class Alert:
    """`since_s`: for how long, if known. `hint`: where to look, or what helps."""

    level: Level
    text: str
    since_s: float | None = None
    hint: str = ""


def alerts(parts: Sequence[Part], cells: Sequence[CellRow], gone: Sequence[GoneRow]) -> list[Alert]:
    """`parts`: of all routers that answer, the asked router's first; `cells`: all cells of these routers."""
    found = [
        *_no_service(parts, cells),
        *_cells_short_of_something(cells),
        *_too_few(parts, cells, gone),
        *_requests(parts),
        *_keys(parts),
        *_routers(parts),
    ]
    return sorted(found, key=lambda alert: alert.level is not Level.ACT)


def _no_service(parts: Sequence[Part], cells: Sequence[CellRow]) -> Iterator[Alert]:
    if parts[0].router.up_s < _STARTS_S:
        return
    if not cells:
        yield _no_cell(parts[0])
        return
    lost = [mode for mode in parts[0].router.deployed.modes if all(mode in cell.lacks for cell in cells)]
    if lost:
        since = min(cell.lacking_s for cell in cells)
        hint = "requests of these modes wait for cluster.queue_timeout_s, then fail"
        yield Alert(Level.ACT, f"no cell serves {', '.join(lost)}", since, hint)


def _no_cell(part: Part) -> Alert:
    hint = "requests wait for cluster.queue_timeout_s, then fail; the cells' logs say what they do"
    if part.gone:
        return Alert(Level.ACT, "no cell lives", min(cell.ago_s for cell in part.gone), hint)
    level = Level.WATCH if part.router.up_s < _LOADS_S else Level.ACT
    return Alert(level, "no cell has started yet", part.router.up_s, hint)


def _cells_short_of_something(cells: Sequence[CellRow]) -> Iterator[Alert]:
    for cell in cells:
        if cell.lacks:
            lost = f"no denoiser in cell {cell.name}" if Mode.AR in cell.modes else f"cell {cell.name} serves nothing"
            rest = f"it serves {', '.join(cell.modes)} meanwhile; " if cell.modes else ""
            doing = "it mends itself" if cell.mending_s else "Serve has to replace it"
            yield Alert(Level.ACT, lost, cell.lacking_s, f"{rest}{doing}; its log says `not whole yet`, and why")
        elif cell.mending_s:
            hint = "it serves all modes meanwhile; its log says why a tower was lost"
            yield Alert(Level.WATCH, f"cell {cell.name} mends itself", cell.mending_s, hint)
        else:
            for tower in cell.towers:
                if not tower.answers and cell.known_s > LONG_WAIT_S:
                    hint = "its process may hang, or its node; after cell.link_timeout_s the cell replaces it"
                    yield Alert(Level.WATCH, f"the {tower.name} tower of cell {cell.name} does not answer", None, hint)


def _too_few(parts: Sequence[Part], cells: Sequence[CellRow], gone: Sequence[GoneRow]) -> Iterator[Alert]:
    wanted, stay = parts[0].router.deployed.min_cells, [cell for cell in cells if not cell.leaves]
    if stay and len(stay) < wanted and parts[0].router.up_s > _STARTS_S:
        hint = "Serve starts another; where it does not, no node has room for one"
        since = min((cell.ago_s for cell in gone), default=None)
        yield Alert(Level.WATCH, f"{len(stay)} of {wanted} cells live", since, hint)
    for cell in gone:
        if cell.lost and cell.ago_s <= _LATELY_S:
            hint = "its requests are resumed elsewhere from their last committed block"
            yield Alert(Level.WATCH, f"cell {cell.name} was lost", cell.ago_s, hint)


def _requests(parts: Sequence[Part]) -> Iterator[Alert]:
    waiting = sum(part.router.waiting for part in parts)
    longest = max(part.router.longest_wait_s for part in parts)
    if waiting and longest > LONG_WAIT_S:
        hint = "the cells are full; raise cluster.max_cells, or wait for the one that is being started"
        yield Alert(Level.WATCH, f"{_counted(waiting, 'request')} waiting for a turn", longest, hint)
    failed = _lately(parts, "failed")
    if failed:
        hint = "the routers' logs have a line for each, with its reason"
        yield Alert(Level.ACT, f"{_counted(failed, 'request')} failed in the last minute", None, hint)
    late = _lately(parts, "late")
    if late:
        hint = "they were cut at their clients' deadline or at ingress.request_timeout_s"
        yield Alert(Level.WATCH, f"{_counted(late, 'request')} not done in time in the last minute", None, hint)
    full = _lately(parts, "refused")
    if full:
        hint = "routers take no more than capacity; raise cluster.max_cells or cluster.max_queued_requests"
        yield Alert(Level.WATCH, f"{_counted(full, 'call')} refused in the last minute for want of room", None, hint)


def _keys(parts: Sequence[Part]) -> Iterator[Alert]:
    """Calls that keys have stopped, by reason."""
    reasons = Counter[str]()
    for event in _events(parts, "key"):
        reasons[event.text.removeprefix("call refused: ")] += event.count
    if reasons:
        told = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(_REASONS))
        hint = "check the clients, and the file of keys: ingress.keys_file"
        refused = _counted(reasons.total(), "call")
        yield Alert(Level.WATCH, f"{refused} refused in the last minute for their keys: {told}", None, hint)
    for part in parts:
        for fault in part.router.faults:
            hint = "the old content stays; the router reads the file again when it changes"
            yield Alert(Level.ACT, f"router {part.router.name} cannot take a file: {fault}", None, hint)


def _counted(amount: int, one: str) -> str:
    return f"{amount:,} {one}{'' if amount == 1 else 's'}"


def _lately(parts: Sequence[Part], kind: str) -> int:
    return sum(event.count for event in _events(parts, kind))


def _events(parts: Sequence[Part], kind: str) -> list[Event]:
    """The events of the last minute."""
    since = parts[0].at - _LATELY_S
    told = [part.histories[part.router.name] for part in parts if part.router.name in part.histories]
    return [event for one in told for event in one.events if event.kind == kind and event.t >= since]


def _routers(parts: Sequence[Part]) -> Iterator[Alert]:
    wanted = parts[0].router.deployed.routers
    if len(parts) < wanted and parts[0].router.up_s > _STARTS_S:
        yield Alert(Level.WATCH, f"{len(parts)} of {wanted} routers answer", None, "Serve starts another")
    if len({part.router.deployed.settings for part in parts}) > 1:
        yield Alert(Level.WATCH, "routers of two deployments run", None, "the older ones finish their requests")
    for part in parts:
        if part.router.drains:
            hint = "it finishes the requests that it holds and takes no more"
            yield Alert(Level.WATCH, f"router {part.router.name} is to end", None, hint)
