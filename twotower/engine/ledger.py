"""The cell's admission ledger: who may start, decided before any tower is touched.

Counts slots and pages of both towers' caches. A request gets all it may ever need or nothing, so an admitted request
never fails for want of room. Pure Python.
"""

from collections import deque
from dataclasses import dataclass

from twotower.core import AnyRequest, Request, RequestId
from twotower.errors import InvalidRequest, Overloaded
from twotower.model.pages import pages_for

MAX_PASSED = 64


@dataclass(slots=True)
class Room:
    """Free slots and pages of one tower's cache."""

    slots: int
    pages: int

    def fits(self, pages: int) -> bool:
        return self.slots >= 1 and self.pages >= pages

    def take(self, pages: int) -> None:
        self.slots -= 1
        self.pages -= pages

    def give(self, pages: int) -> None:
        self.slots += 1
        self.pages += pages


@dataclass(frozen=True, slots=True)
class Place:
    """What one admitted request holds: its pages on the context tower and, with `denoiser`, on that mirror."""

    pages: int
    denoiser: int | None


@dataclass(slots=True)
class _Waiting:
    """A queued request and how many of a lower value have gone in front of it."""

    request: AnyRequest
    passed: int = 0


class Ledger:
    """Admits requests by priority while both caches have room for the whole of them.

    The order is settled on arrival: a request goes in front of those that wait with a higher value, but behind any
    that `max_passed` have passed already. So equals are served first come, first served, and whoever waits, the head
    that waits for a lot of room too, waits for those it found in front of it and `max_passed` more at most. Nothing
    that runs is interrupted, and a full queue refuses whatever the priority.

    `mirrors` has one entry per denoiser; empty where the denoiser reads the context tower's own cache (local
    exchange) or where there is none.
    """

    def __init__(self, context: Room, mirrors: list[Room], max_queued: int, max_passed: int = MAX_PASSED) -> None:
        self._context, self._mirrors = context, mirrors
        self._whole = Room(context.slots, context.pages)
        self._max_queued, self._max_passed = max_queued, max_passed
        self._queue: deque[_Waiting] = deque()
        self._places: dict[RequestId, Place] = {}

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return len(self._places)

    @property
    def context(self) -> Room:
        return self._context

    @property
    def mirrors(self) -> list[Room]:
        return self._mirrors

    def enqueue(self, request: AnyRequest) -> None:
        """Queue a request. Raises Overloaded when the queue is full, InvalidRequest if the request can never fit."""
        wanted = pages_for(request.positions)
        if wanted > self._whole.pages:
            raise InvalidRequest.of(
                "max_new_tokens" if isinstance(request, Request) else "token_ids",
                f"got a request of {request.positions} positions ({wanted} pages), "
                f"wanted at most {self._whole.pages} pages, which is this cell's whole cache",
            )
        if len(self._queue) >= self._max_queued and not self._could_start(request):
            raise Overloaded(
                f"{len(self._queue)} requests are waiting and {len(self._places)} running; wanted fewer than "
                f"{self._max_queued} waiting"
            )
        place = len(self._queue)
        while place and self._lets_pass(self._queue[place - 1], request):
            place -= 1
            self._queue[place].passed += 1
        self._queue.insert(place, _Waiting(request))

    def admit(self) -> list[tuple[AnyRequest, Place]]:
        """Requests that may start now, in order. The first that does not fit holds up all behind it: no starvation."""
        admitted = []
        while self._queue:
            request = self._queue[0].request
            place = self._place_for(request)
            if place is None:
                break
            self._queue.popleft()
            self._context.take(place.pages)
            if place.denoiser is not None and self._mirrors:
                self._mirrors[place.denoiser].take(place.pages)
            self._places[request.id] = place
            admitted.append((request, place))
        return admitted

    def withdraw(self, request_id: RequestId) -> bool:
        """Take a request out of the queue; False if it is not waiting there."""
        for place, waiting in enumerate(self._queue):
            if waiting.request.id == request_id:
                del self._queue[place]
                return True
        return False

    def release(self, request_id: RequestId) -> None:
        """Count a finished request's room as free."""
        place = self._places.pop(request_id)
        self._context.give(place.pages)
        if place.denoiser is not None and self._mirrors:
            self._mirrors[place.denoiser].give(place.pages)

    def _lets_pass(self, waiting: _Waiting, later: AnyRequest) -> bool:
        return later.priority < waiting.request.priority and waiting.passed < self._max_passed

    def _could_start(self, request: AnyRequest) -> bool:
        return not self._queue and self._place_for(request) is not None

    def _place_for(self, request: AnyRequest) -> Place | None:
        pages = pages_for(request.positions)
        if not self._context.fits(pages):
            return None
        if not request.needs_denoiser:
            return Place(pages, None)
        if not self._mirrors:
            return Place(pages, 0)
        fitting = [i for i, mirror in enumerate(self._mirrors) if mirror.fits(pages)]
        roomiest = max(fitting, key=lambda i: (self._mirrors[i].slots, self._mirrors[i].pages), default=None)
        return None if roomiest is None else Place(pages, roomiest)
