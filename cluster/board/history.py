"""The last hours in bounded memory: seconds for ten minutes, tens of seconds for three hours, and what has happened."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cluster.board.series import KEPT, Point, over_time

FINE_S, COARSE_S = 1, 10
FINE_POINTS, COARSE_POINTS = 600, 1080
MOST_EVENTS = 200
_SAME_S = 10  # a repetition within this time counts as the same event
_RESENT_S = 5  # points that may have changed since they were last sent


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at a moment, `count` times. `kind`: its mark on the page."""

    t: float
    kind: str
    text: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Told:
    """A router's history, or the news of it, as sent to other routers."""

    fine: tuple[Point, ...] = ()
    coarse: tuple[Point, ...] = ()
    events: tuple[Event, ...] = ()


class History:
    """What one router has seen. Times are seconds since the epoch, so that routers' histories lie on one axis."""

    def __init__(self) -> None:
        self.fine: dict[int, Point] = {}
        self.coarse: dict[int, Point] = {}
        self._events: list[Event] = []

    @property
    def last(self) -> int:
        """When its last point begins; 0 where there is none."""
        return max(self.fine, default=0)

    @property
    def events(self) -> tuple[Event, ...]:
        return tuple(self._events)

    def add(self, point: Point) -> None:
        """A second that has passed."""
        self.fine[point.t] = point
        begin = point.t - point.t % COARSE_S
        seconds = [self.fine[t] for t in range(begin, begin + COARSE_S) if t in self.fine]
        self.coarse[begin] = over_time(begin, seconds)
        _bound(self.fine, FINE_POINTS)
        _bound(self.coarse, COARSE_POINTS)

    def note(self, t: float, kind: str, text: str) -> None:
        """Something has happened."""
        for place in range(len(self._events) - 1, -1, -1):
            event = self._events[place]
            if t - event.t > _SAME_S:
                break
            if (event.kind, event.text) == (kind, text):
                self._events[place] = replace(event, count=event.count + 1)
                return
        self._events.append(Event(t, kind, text))
        del self._events[:-MOST_EVENTS]

    def told(self, since: int = 0) -> Told:
        """The part after the second `since`; 0: everything."""
        begin = since - _RESENT_S if since else 0
        fine = tuple(point for t, point in sorted(self.fine.items()) if t >= begin)
        coarse = tuple(point for t, point in sorted(self.coarse.items()) if t >= begin - COARSE_S)
        return Told(fine, coarse, self.events)

    def hear(self, told: Told) -> None:
        """Take the points that another router has sent. Points of another version's series are left out."""
        for kept, points, most in (
            (self.fine, told.fine, FINE_POINTS),
            (self.coarse, told.coarse, COARSE_POINTS),
        ):
            kept.update({point.t: point for point in points if len(point.values) == len(KEPT)})
            _bound(kept, most)
        self._events = list(told.events[-MOST_EVENTS:])


def _bound(points: dict[int, Point], most: int) -> None:
    while len(points) > most:
        del points[min(points)]


def merged_events(all_events: Iterable[Event], within_s: float = 30.0) -> list[Event]:
    """The events of all routers in order. If several routers saw the same event of a cell or a deployment, it is one
    event.
    """
    merged: list[Event] = []
    last: dict[tuple[str, str], int] = {}
    for event in sorted(all_events, key=lambda one: one.t):
        key = event.kind, event.text
        known = last.get(key)
        if known is not None and event.t - merged[known].t <= within_s:
            one = merged[known]
            seen_by_all = event.kind in SEEN_BY_ALL
            merged[known] = replace(one, count=max(one.count, event.count) if seen_by_all else one.count + event.count)
            continue
        last[key] = len(merged)
        merged.append(event)
    return merged[-MOST_EVENTS:]


SEEN_BY_ALL = frozenset({"cell", "lost", "mend", "deploy"})  # kinds that each router reports only of itself
