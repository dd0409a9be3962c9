"""The cell's admission ledger: who may start, decided before any tower is touched.

Has a `Room` for each cache of the cell's towers. A request gets all the room it may ever need in each of them, or none.
So an admitted request never fails for want of room. Pure Python.
"""

from collections import deque
from dataclasses import dataclass

from twotower.core import AnyRequest, Request, RequestId
from twotower.engine.sharing import HeldInCommon, SharedRoom, shared_names
from twotower.errors import InvalidRequest, Overloaded
from twotower.model.room import Held, Room

MAX_PASSED = 64


@dataclass(frozen=True, slots=True)
class Place:
    """An admitted request's place: the denoiser that leads it, if any, and its room in the context tower's cache and in
    the denoiser's mirror.
    """

    denoiser: int | None
    held: HeldInCommon
    mirrored: tuple[Room, Held] | None = None


@dataclass(slots=True)
class _Waiting:
    """A queued request, and how many requests of a lower value have passed it. `only`: the denoiser that must lead it.
    `names`: the prefixes that it may share.
    """

    request: AnyRequest
    names: tuple[bytes, ...]
    only: int | None = None
    passed: int = 0


class Ledger:
    """Admits requests by priority while both caches have room for the whole of them.

    The order is fixed on arrival. A request goes before waiting requests with a higher value, but not before a request
    that `max_passed` others have passed already. So equals are served in the order of arrival. Every request, also a
    head that needs much room, waits for those it found before it, and for at most `max_passed` more. A running request
    is never interrupted, and a full queue refuses requests of any priority.

    `mirrors` has one entry per denoiser; empty where the denoiser reads the context tower's own cache (local exchange)
    or where there is none. Sequences share no pages in a mirror. In the context tower's cache, prefixes that running
    requests share count once, and other kept prefixes count as free. `stride`: where prefixes may end
    (`EngineSettings.prefix_stride`); 0: nothing is shared.
    """

    def __init__(
        self,
        context: Room,
        mirrors: list[Room],
        max_queued: int,
        max_passed: int = MAX_PASSED,
        stride: int = 0,
    ) -> None:
        self._context, self._mirrors = context, mirrors
        self._shared, self._stride = SharedRoom(context, stride), stride
        self._max_queued, self._max_passed = max_queued, max_passed
        self._queue: deque[_Waiting] = deque()
        self._closed: set[int] = set()
        self._orphaned: dict[int, list[Place]] = {}
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

    def lose(self, denoiser: int) -> list[RequestId]:
        """This denoiser is lost. Returns the requests that it led, which have ended. Only requests for this denoiser
        are placed there now. The room of its requests stays taken until `regain`, because the context tower may not
        have released it yet.
        """
        self._closed.add(denoiser)
        led = [request_id for request_id, place in self._places.items() if place.denoiser == denoiser]
        self._orphaned.setdefault(denoiser, []).extend(self._places.pop(request_id) for request_id in led)
        return led

    def regain(self, denoiser: int) -> None:
        """After `lose`: the room of its requests is free."""
        for place in self._orphaned.pop(denoiser, []):
            self._give(place)

    def open(self, denoiser: int) -> None:
        """After `regain`: place anything there again."""
        self._closed.discard(denoiser)

    def enqueue(self, request: AnyRequest, only: int | None = None) -> None:
        """Queue a request. Raises Overloaded when the queue is full, InvalidRequest if the request can never fit.

        `only`: the denoiser that it is for, whether that is closed or not.
        """
        wanted = self._context.pages_for(request.positions)
        if wanted > self._context.pages:
            raise InvalidRequest.of(
                "max_new_tokens" if isinstance(request, Request) else "token_ids",
                f"got a request of {request.positions} positions ({wanted} pages), "
                f"wanted at most {self._context.pages} pages, which is this cell's whole cache",
            )
        waiting = _Waiting(request, shared_names(request, self._stride), only)
        if len(self._queue) >= self._max_queued and not self._could_start(waiting):
            raise Overloaded(
                f"{len(self._queue)} requests are waiting and {len(self._places)} running; wanted fewer than "
                f"{self._max_queued} waiting"
            )
        place = len(self._queue)
        while place and self._lets_pass(self._queue[place - 1], request):
            place -= 1
            self._queue[place].passed += 1
        self._queue.insert(place, waiting)

    def admit(self) -> list[tuple[AnyRequest, Place]]:
        """Requests that may start now, in order. The first that does not fit delays all later ones, so none starves."""
        admitted = []
        while self._queue:
            waiting = self._queue[0]
            found = self._find(waiting)
            if found is None:
                break
            self._queue.popleft()
            denoiser, mirror = found
            request, positions = waiting.request, waiting.request.positions
            held = self._shared.take(positions, waiting.names)
            place = Place(denoiser, held, None if mirror is None else (mirror, mirror.take(positions)))
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
        self._give(self._places.pop(request_id))

    def _lets_pass(self, waiting: _Waiting, later: AnyRequest) -> bool:
        return later.priority < waiting.request.priority and waiting.passed < self._max_passed

    def _could_start(self, waiting: _Waiting) -> bool:
        return not self._queue and self._find(waiting) is not None

    def _find(self, waiting: _Waiting) -> tuple[int | None, Room | None] | None:
        """The denoiser that would lead it, and the mirror that would hold it; None if it does not fit."""
        request, only = waiting.request, waiting.only
        if not self._shared.fits(request.positions, waiting.names):
            return None
        if not request.needs_denoiser:
            return None, None
        if not self._mirrors:
            return 0, None
        allowed = [i for i in range(len(self._mirrors)) if (i not in self._closed if only is None else i == only)]
        fitting = [i for i in allowed if self._mirrors[i].fits(request.positions)]
        if not fitting:
            return None
        roomiest = max(fitting, key=lambda i: (self._mirrors[i].free_slots, self._mirrors[i].free_pages))
        return roomiest, self._mirrors[roomiest]

    def _give(self, place: Place) -> None:
        self._shared.give(place.held)
        if place.mirrored is not None:
            room, held = place.mirrored
            room.give(held)
