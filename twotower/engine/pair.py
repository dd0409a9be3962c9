"""A pair: one context engine, its denoiser engines, the ledger. The asynchronous face of decoding and scoring.

Knows requests and events; does not know where the engines run (a thread here, an actor elsewhere), what text is, or who
asks. The loss of an engine ends the requests that it leads; the loss of the context engine ends all.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from operator import methodcaller

from twotower.core import (
    AnyRequest,
    BlockEvent,
    Event,
    FailureEvent,
    Mode,
    ReleasedEvent,
    Request,
    RequestId,
    ScoreEvent,
    ScoreRequest,
    ToldEvent,
)
from twotower.engine.handle import EngineHandle
from twotower.engine.inbox import Inbox
from twotower.engine.ledger import Ledger, Place
from twotower.errors import DeadlineExceeded, InvalidRequest, Overloaded, TwoTowerError, Unavailable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request, the inbox of its events, and the denoiser that must lead it, if it must be a certain one."""

    request: AnyRequest
    inbox: Inbox
    only: int | None


class Pair:
    """Decodes and scores requests, many at a time. Use as an async context manager, or `start` and `close` it.

    `denoisers` may be empty (`ar_only`), and may hold the context handle itself (both towers in one process).
    `failure`: why nothing is served any more. `lost`: lost denoisers, and why. `on_loss` is called with the number of a
    lost denoiser, or with None if the context engine is lost.
    """

    def __init__(
        self,
        context: EngineHandle,
        denoisers: Sequence[EngineHandle],
        ledger: Ledger,
        on_loss: Callable[[int | None], None] | None = None,
    ) -> None:
        self.context, self.denoisers, self.ledger = context, list(denoisers), ledger
        self.failure: TwoTowerError | None = None
        self.lost: dict[int, TwoTowerError] = {}
        self._on_loss = on_loss
        self._trials: dict[int, TwoTowerError] = {}  # replaced, but not accepted yet
        self._asked: dict[RequestId, _Asked] = {}
        self._places: dict[RequestId, Place | None] = {}
        self._pumps: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Pair":
        self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def start(self) -> None:
        """Begin listening to the engines. Needs a running event loop."""
        self._pumps = [asyncio.create_task(self._pump(self.context, None))]
        for index, handle in enumerate(self.denoisers):
            if handle is not self.context:
                self._pumps.append(asyncio.create_task(self._pump(handle, index)))

    async def close(self) -> None:
        """Stop listening and fail what is still running."""
        for task in self._pumps:
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        self.failure = self.failure or Unavailable("it is shutting down")
        self._fail_all(Unavailable("the cell is shutting down"))

    def generate(self, request: Request, timeout_s: float | None = None) -> AsyncGenerator[BlockEvent, None]:
        """The blocks of one request until its finish. Leaving the iterator early frees the sequence on both towers.

        Raises Overloaded or Unavailable before the first event, DeadlineExceeded after `timeout_s` seconds, and
        whatever error ended the sequence.
        """
        return self._generate(request, timeout_s, None)

    def events(self, request: Request, timeout_s: float | None = None) -> AsyncGenerator[ToldEvent, None]:
        """As `generate`, with the request's trace between the blocks if it asks for one."""
        return self._run(request, timeout_s, None)

    async def _generate(
        self, request: Request, timeout_s: float | None, only: int | None
    ) -> AsyncGenerator[BlockEvent, None]:
        async with aclosing(self._run(request, timeout_s, only)) as events:
            async for event in events:
                if isinstance(event, BlockEvent):
                    yield event

    def why_not(self, request: AnyRequest) -> TwoTowerError | None:
        """Why a request of this kind is not served now; None if it is."""
        if self.failure is None and request.needs_denoiser and not self._has_denoiser():
            return next(iter((self.lost | self._trials).values()), None)
        return self.failure

    def serves(self, mode: Mode) -> bool:
        """Whether requests of this mode are served now."""
        return self.failure is None and (mode is Mode.AR or self._has_denoiser())

    def _has_denoiser(self) -> bool:
        return len(self.lost) + len(self._trials) < len(self.denoisers)

    def regain(self, index: int) -> None:
        """The context engine has released the lost denoiser's sequences: others may have the room."""
        self.ledger.regain(index)
        self._admit()

    def replace(self, index: int, handle: EngineHandle) -> "Trial":
        """Put another engine in the place of a lost one, on trial. The context engine has released the old one's
        sequences.
        """
        assert index in self.lost and self.failure is None
        self.ledger.regain(index)
        self.denoisers[index] = handle
        self._trials[index] = self.lost.pop(index)
        self._pumps.append(asyncio.create_task(self._pump(handle, index)))
        self._admit()
        return Trial(self, index)

    def accept(self, index: int) -> None:
        """After `replace`: let the engine serve all requests."""
        del self._trials[index]
        self.ledger.open(index)
        self._admit()

    async def score(self, request: ScoreRequest, timeout_s: float | None = None) -> ScoreEvent:
        """Log-probabilities of given tokens under the context tower. Waits, ends and raises as `generate` does."""
        async with aclosing(self._run(request, timeout_s, None)) as events:
            event = await anext(events)
            assert isinstance(event, ScoreEvent), event
            return event

    async def _run(
        self, request: AnyRequest, timeout_s: float | None, only: int | None
    ) -> AsyncGenerator[ToldEvent, None]:
        """Events of one request until its last. `only`: the denoiser that is to lead it."""
        self._admissible(request, only)
        if isinstance(request, Request):
            _check_committed(request)
        inbox = Inbox(merging=isinstance(request, Request) and request.params.mode.by_token)
        self.ledger.enqueue(request, only)
        self._asked[request.id] = _Asked(request, inbox, only)
        self._places[request.id] = None
        self._admit()
        # The deadline belongs to the request, not to its reader, who may be busy elsewhere when it passes.
        timer = None
        if timeout_s is not None:
            timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, request.id, timeout_s)
        done = False
        try:
            while not done:
                event = await inbox.get()
                if isinstance(event, FailureEvent):
                    done = True
                    raise event.error
                done = event.is_last
                yield event
        finally:
            if timer is not None:
                timer.cancel()
            self._asked.pop(request.id, None)
            if not done:
                self._abandon(request.id)

    def _admissible(self, request: AnyRequest, only: int | None) -> None:
        failure = self.failure if only is not None else self.why_not(request)
        if failure is not None:
            raise Unavailable(f"this cell cannot serve: {failure}")
        if request.id in self._asked:
            raise InvalidRequest.of("request_id", f"got {request.id!r}, which is already running here")
        if request.id in self._places:
            raise Overloaded(f"request {request.id} has ended and is still being released; try again")
        if isinstance(request, Request) and request.needs_denoiser and not self.denoisers:
            raise InvalidRequest.of("mode", f"got {request.params.mode}, wanted ar: this cell has no denoiser tower")

    def _admit(self) -> None:
        """Start all requests that the ledger admits, one message per engine."""
        batches: dict[int | None, list[AnyRequest]] = {}
        for request, place in self.ledger.admit():
            self._places[request.id] = place
            batches.setdefault(place.denoiser, []).append(request)
        for denoiser, requests in batches.items():
            self._tell(denoiser, methodcaller("add", requests))

    def _tell(self, denoiser: int | None, say: Callable[[EngineHandle], None]) -> None:
        """Send to the engine of a place. An engine that cannot be reached is lost."""
        handle = self.context if denoiser is None else self.denoisers[denoiser]
        part = None if handle is self.context else denoiser
        try:
            say(handle)
        except TwoTowerError as error:
            self.lose(part, error)
        except Exception as error:
            logger.exception("a message to an engine failed")
            self.lose(part, Unavailable(f"a message to an engine failed: {type(error).__name__}"))

    def _expire(self, request_id: RequestId, timeout_s: float) -> None:
        error = DeadlineExceeded(f"request {request_id}: not finished within {timeout_s:g} s")
        self._asked[request_id].inbox.put(FailureEvent(request_id, error))
        self._abandon(request_id)

    def _abandon(self, request_id: RequestId) -> None:
        """The request's reader has left, whether the request waits, runs or has just ended."""
        if self.ledger.withdraw(request_id):
            del self._places[request_id]
            self._admit()  # it may have delayed later requests
            return
        place = self._places.get(request_id)
        if place is not None and self.failure is None and place.denoiser not in self.lost:
            self._tell(place.denoiser, methodcaller("cancel", [request_id]))

    async def _pump(self, handle: EngineHandle, denoiser: int | None) -> None:
        try:
            while True:
                for event in await handle.events():
                    self._dispatch(event)
        except TwoTowerError as error:
            self._has_ended(handle, denoiser, error)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.exception("an engine's event stream broke")
            told = Unavailable(f"an engine's event stream broke: {type(error).__name__}")
            self._has_ended(handle, denoiser, told)

    def _has_ended(self, handle: EngineHandle, denoiser: int | None, error: TwoTowerError) -> None:
        """Events of a replaced engine are dropped."""
        if denoiser is None or self.denoisers[denoiser] is handle:
            self.lose(denoiser, error)

    def _dispatch(self, event: Event) -> None:
        if isinstance(event, ReleasedEvent):
            if event.request_id in self._places:
                self._released(event.request_id)
                self._admit()
            return
        asked = self._asked.get(event.request_id)
        if asked is not None:
            asked.inbox.put(event)

    def _released(self, request_id: RequestId) -> None:
        del self._places[request_id]
        self.ledger.release(request_id)

    def lose(self, denoiser: int | None, error: TwoTowerError) -> None:
        """An engine is lost, and its requests cannot continue; None: all engines."""
        if self.failure is not None or denoiser in self.lost:
            return
        if denoiser is None:
            logger.error("pair cannot serve any more: %s", error)
            self.failure = error
            self._fail_all(error)
        else:
            logger.error("denoiser %d is lost: %s", denoiser, error)
            self.lost[denoiser] = error
            self._trials.pop(denoiser, None)
            self._fail_led_by(denoiser, error)
        if self._on_loss is not None:
            self._on_loss(denoiser)

    def _fail_led_by(self, denoiser: int, error: TwoTowerError) -> None:
        """Fail its requests; if no denoiser is left, also those that wait for one."""
        for request_id in self.ledger.lose(denoiser):
            del self._places[request_id]
            if request_id in self._asked:
                self._asked[request_id].inbox.put(FailureEvent(request_id, error))
        for request_id, asked in list(self._asked.items()):
            for_it = asked.only == denoiser or (asked.request.needs_denoiser and not self._has_denoiser())
            if for_it and self.ledger.withdraw(request_id):
                del self._places[request_id]
                asked.inbox.put(FailureEvent(request_id, error))

    def _fail_all(self, error: TwoTowerError) -> None:
        for request_id, asked in self._asked.items():
            asked.inbox.put(FailureEvent(request_id, error))


class Trial:
    """One denoiser of a pair, before it serves requests: the part of a Pair that a self-test needs."""

    def __init__(self, pair: Pair, index: int) -> None:
        self._pair, self._index = pair, index

    @property
    def ledger(self) -> Ledger:
        return self._pair.ledger

    def generate(self, request: Request, timeout_s: float | None = None) -> AsyncGenerator[BlockEvent, None]:
        return self._pair._generate(request, timeout_s, self._index)

    async def score(self, request: ScoreRequest, timeout_s: float | None = None) -> ScoreEvent:
        return await self._pair.score(request, timeout_s)


def _check_committed(request: Request) -> None:
    """Check that a resumed request's committed tokens leave something to do, and end with a block. Raises
    InvalidRequest.
    """
    got, params = len(request.committed), request.params
    if got >= params.max_new_tokens:
        raise InvalidRequest.of(
            "committed", f"got {got} tokens, wanted fewer than max_new_tokens ({params.max_new_tokens})"
        )
    if params.mode is Mode.DIFFUSION and got % params.block_size:
        raise InvalidRequest.of("committed", f"got {got} tokens, wanted whole blocks of {params.block_size}")
