"""A pair: one context engine, its denoiser engines, the ledger. The asynchronous face of decoding and scoring.

Knows requests and events; does not know where the engines run (a thread here, an actor elsewhere), what text is, or
who asks.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TypeVar

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
)
from twotower.engine.handle import EngineHandle
from twotower.engine.inbox import Inbox
from twotower.engine.ledger import Ledger, Place
from twotower.errors import DeadlineExceeded, InvalidRequest, Overloaded, TwoTowerError, Unavailable

logger = logging.getLogger(__name__)

AnswerKind = TypeVar("AnswerKind", BlockEvent, ScoreEvent)


class Pair:
    """Decodes and scores requests, many at a time. Use as an async context manager, or `start` and `close` it.

    `denoisers` may be empty (`ar_only`), and may hold the context handle itself (both towers in one process).
    """

    def __init__(self, context: EngineHandle, denoisers: Sequence[EngineHandle], ledger: Ledger) -> None:
        self.context, self.denoisers, self.ledger = context, list(denoisers), ledger
        self.failure: TwoTowerError | None = None
        self._queues: dict[RequestId, Inbox] = {}
        self._places: dict[RequestId, Place | None] = {}
        self._pumps: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Pair":
        self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def start(self) -> None:
        """Begin listening to the engines. Needs a running event loop."""
        handles = {id(handle): handle for handle in [self.context, *self.denoisers]}
        self._pumps = [asyncio.create_task(self._pump(handle)) for handle in handles.values()]

    async def close(self) -> None:
        """Stop listening and fail what is still running."""
        for task in self._pumps:
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        self.failure = self.failure or Unavailable("it is shutting down")
        self._fail_all(Unavailable("the cell is shutting down"))

    def generate(self, request: Request, timeout_s: float | None = None) -> AsyncGenerator[BlockEvent, None]:
        """Events of one request until its finish. Leaving the iterator early frees the sequence on both towers.

        Raises Overloaded or Unavailable before the first event, DeadlineExceeded after `timeout_s` seconds, and
        whatever error ended the sequence.
        """
        return self._run(request, BlockEvent, timeout_s, merging=request.params.mode is not Mode.DIFFUSION)

    async def score(self, request: ScoreRequest, timeout_s: float | None = None) -> ScoreEvent:
        """How likely the context tower finds given tokens. Waits, ends and raises as `generate` does."""
        async with aclosing(self._run(request, ScoreEvent, timeout_s)) as events:
            return await anext(events)

    async def _run(
        self, request: AnyRequest, kind: type[AnswerKind], timeout_s: float | None, merging: bool = False
    ) -> AsyncGenerator[AnswerKind, None]:
        """Events of one request, all of one kind, until its last."""
        self._admissible(request)
        if isinstance(request, Request):
            _check_committed(request)
        inbox = Inbox(merging)
        self.ledger.enqueue(request)
        self._queues[request.id] = inbox
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
                assert isinstance(event, kind), event
                done = event.is_last
                yield event
        finally:
            if timer is not None:
                timer.cancel()
            self._queues.pop(request.id, None)
            if not done:
                self._abandon(request.id)

    def _admissible(self, request: AnyRequest) -> None:
        if self.failure is not None:
            raise Unavailable(f"this cell cannot serve: {self.failure}")
        if request.id in self._queues:
            raise InvalidRequest.of("request_id", f"got {request.id!r}, which is already running here")
        if request.id in self._places:
            raise Overloaded(f"request {request.id} has ended and is still being released; try again")
        if isinstance(request, Request) and request.needs_denoiser and not self.denoisers:
            raise InvalidRequest.of("mode", f"got {request.params.mode}, wanted ar: this cell has no denoiser tower")

    def _handle_for(self, place: Place) -> EngineHandle:
        return self.context if place.denoiser is None else self.denoisers[place.denoiser]

    def _admit(self) -> None:
        """Start everything the ledger lets in, one message per engine."""
        batches: dict[int, tuple[EngineHandle, list[AnyRequest]]] = {}
        for request, place in self.ledger.admit():
            self._places[request.id] = place
            handle = self._handle_for(place)
            batches.setdefault(id(handle), (handle, []))[1].append(request)
        for handle, requests in batches.values():
            self._tell(partial(handle.add, requests))

    def _tell(self, call: Callable[[], None]) -> None:
        try:
            call()
        except TwoTowerError as error:
            self._break(error)
        except Exception as error:
            logger.exception("a message to an engine failed")
            self._break(Unavailable(f"a message to an engine failed: {type(error).__name__}"))

    def _expire(self, request_id: RequestId, timeout_s: float) -> None:
        error = DeadlineExceeded(f"request {request_id}: not finished within {timeout_s:g} s")
        self._queues[request_id].put(FailureEvent(request_id, error))
        self._abandon(request_id)

    def _abandon(self, request_id: RequestId) -> None:
        """Nobody wants this request any more, whether it waits, runs or has just ended."""
        if self.ledger.withdraw(request_id):
            del self._places[request_id]
            self._admit()  # it may have held up those behind it
            return
        place = self._places.get(request_id)
        if place is not None and self.failure is None:
            self._tell(partial(self._handle_for(place).cancel, [request_id]))

    async def _pump(self, handle: EngineHandle) -> None:
        try:
            while True:
                for event in await handle.events():
                    self._dispatch(event)
        except TwoTowerError as error:
            self._break(error)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.exception("an engine's event stream broke")
            self._break(Unavailable(f"an engine's event stream broke: {type(error).__name__}"))

    def _dispatch(self, event: Event) -> None:
        if isinstance(event, ReleasedEvent):
            if event.request_id in self._places:
                del self._places[event.request_id]
                self.ledger.release(event.request_id)
                self._admit()
            return
        inbox = self._queues.get(event.request_id)
        if inbox is not None:
            inbox.put(event)

    def _break(self, error: TwoTowerError) -> None:
        """An engine is gone: nothing that runs here can go on."""
        if self.failure is None:
            logger.error("pair cannot serve any more: %s", error)
            self.failure = error
        self._fail_all(error)

    def _fail_all(self, error: TwoTowerError) -> None:
        for request_id, inbox in self._queues.items():
            inbox.put(FailureEvent(request_id, error))


def _check_committed(request: Request) -> None:
    """What a request brings of its own answer leaves something to do, and ends with a block. Raises InvalidRequest."""
    got, params = len(request.committed), request.params
    if got >= params.max_new_tokens:
        raise InvalidRequest.of(
            "committed", f"got {got} tokens, wanted fewer than max_new_tokens ({params.max_new_tokens})"
        )
    if params.mode is Mode.DIFFUSION and got % params.block_size:
        raise InvalidRequest.of("committed", f"got {got} tokens, wanted whole blocks of {params.block_size}")
