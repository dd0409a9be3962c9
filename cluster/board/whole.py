"""The boards of all routers as one snapshot, for `/ops/snapshot` and the page."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic_core import to_json

from cluster.board.alerts import Alert, alerts
from cluster.board.cells_seen import CellRow, GoneRow
from cluster.board.history import COARSE_S, Event, History, merged_events
from cluster.board.part import Part, RouterRow
from cluster.board.runs_seen import RunRow
from cluster.board.series import PLACE, Point, across_routers, first_token_quantile

COLUMNS = (
    "t", "tokens", "tokens_per_step", "first_token_p50", "first_token_p95", "waiting", "longest_wait", "running",
    "ended", "failed", "refused", "resumed", "cells", "exchange", "exposed", "busy_context", "busy_denoiser",
)  # fmt: skip
_PLACES = [(name, PLACE.get(name, -1)) for name in COLUMNS[1:]]
_AT_A_TIME = 50  # points, some milliseconds
_SETTLED_S = 2  # age at which all routers have reported a second
_EVENTS_S = 60  # older events than points: a repeated event is sent again

Row = list[float | None]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`by`: the router that was asked. `requests` by router; `more_requests`: the number not shown. `fine`, `coarse`:
    points of one and of ten seconds, each a row in the order of `columns`.
    """

    at: float
    by: str
    alerts: list[Alert]
    routers: list[RouterRow]
    cells: list[CellRow]
    gone: list[GoneRow]
    requests: dict[str, tuple[RunRow, ...]]
    more_requests: int
    columns: tuple[str, ...]
    fine: list[Row]
    coarse: list[Row]
    events: list[Event]

    def encoded(self) -> bytes:
        return to_json(self)


async def snapshot(parts: Sequence[Part], histories: Sequence[History], since: int = 0) -> Snapshot:
    """`parts`: of all routers that answer, the asked router's first. Points from `since` on, in seconds. The event loop
    runs other tasks between points.
    """
    own, now = parts[0], int(parts[0].at)
    fine = await rows([history.fine for history in histories], since, now - _SETTLED_S)
    coarse = await rows([history.coarse for history in histories], since - COARSE_S, now - COARSE_S)
    cells, gone = cells_of(parts), gone_of(parts)
    events = merged_events(event for history in histories for event in history.events)
    by_name = sorted(parts, key=lambda part: part.router.name)
    return Snapshot(
        at=round(own.at, 3),
        by=own.router.name,
        alerts=alerts(parts, cells, gone),
        routers=[part.router for part in by_name],
        cells=cells,
        gone=gone,
        requests={part.router.name: part.runs for part in by_name},
        more_requests=sum(part.more for part in parts),
        columns=COLUMNS,
        fine=fine,
        coarse=coarse,
        events=[event for event in events if event.t >= since - _EVENTS_S],
    )


def cells_of(parts: Sequence[Part]) -> list[CellRow]:
    """Each cell once: as the first router hears it that hears it."""
    cells: dict[str, CellRow] = {}
    for part in parts:
        for cell in part.cells:
            cells.setdefault(cell.name, cell)
    return [cells[name] for name in sorted(cells)]


def gone_of(parts: Sequence[Part]) -> list[GoneRow]:
    """Cells that no router hears any more."""
    there = {cell.name for part in parts for cell in part.cells}
    gone = {cell.name: cell for part in reversed(parts) for cell in part.gone if cell.name not in there}
    return [gone[name] for name in sorted(gone)]


async def rows(histories: Sequence[Mapping[int, Point]], since: int, until: int) -> list[Row]:
    """A row for each moment of which any router has told."""
    told = []
    for place, t in enumerate(sorted({t for history in histories for t in history if since <= t < until})):
        points = [point for history in histories if (point := history.get(t)) is not None]
        if points:
            told.append(_row(points[0] if len(points) == 1 else across_routers(t, points)))
        if place % _AT_A_TIME == _AT_A_TIME - 1:
            await asyncio.sleep(0)
    return told


def _row(point: Point) -> Row:
    told: dict[str, float | None] = {
        "tokens_per_step": point["step_tokens"] / point["steps"] if point["steps"] > 0 else None,
        "first_token_p50": first_token_quantile(point.firsts, 0.5),
        "first_token_p95": first_token_quantile(point.firsts, 0.95),
        "waiting": point["waiting"] + point["queued"],
    }
    values = [told[name] if name in told else point.values[place] for name, place in _PLACES]
    return [point.t, *[float("%.4g" % value) if value else value for value in values]]  # noqa: UP031  # twice as fast
