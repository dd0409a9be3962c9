"""A tower process's end of its line to the cell: requests come in, events go out, over one loopback connection.

Ray starts, places and ends the processes, but events do not go through it: a call of Ray's costs the tower's
interpreter milliseconds, as much as a small model's forward; a frame costs tens of microseconds and is sent by the
engine's own thread.
"""

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from actors.frames import GREETING_S, TOKEN_BYTES, LineAddress, at_once, framed_all, is_token, new_token, take_frames
from twotower.core import (
    AnyRequest,
    BlockEvent,
    Event,
    FailureEvent,
    ReleasedEvent,
    Request,
    RequestId,
    ScoreEvent,
    ScoreRequest,
)
from twotower.engine.runner import EngineRunner
from twotower.errors import TwoTowerError, Unavailable
from twotower.wire import Codec

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"  # a cell's processes share a node
_BEAT_S = 1.0
_RECEIVE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Add:
    """Decode this request."""

    request: Request


@dataclass(frozen=True, slots=True)
class Score:
    """Score this one."""

    request: ScoreRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give this one up."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine is gone; nothing follows."""

    reason: str


Order = Add | Score | Cancel
ORDERS: Codec[Order] = Codec(Add, Score, Cancel)
NEWS: Codec[Event | Ended] = Codec(BlockEvent, ScoreEvent, FailureEvent, ReleasedEvent, Ended)


def order_of(request: AnyRequest) -> Order:
    """What makes a tower process start on it."""
    return Score(request) if isinstance(request, ScoreRequest) else Add(request)


class TowerLine:
    """Listens for the cell, then serves it until either is gone. An empty frame goes out in time, as a sign of life."""

    def __init__(self, runner: EngineRunner, timeout_s: float) -> None:
        self._runner, self._timeout_s = runner, timeout_s
        self._beat_s = min(_BEAT_S, timeout_s / 4)
        self._sending = threading.Lock()
        self._socket: socket.socket | None = None

    def open(self) -> LineAddress:
        """Returns at once with the address for the cell to connect to."""
        listener = socket.create_server((HOST, 0), backlog=4)
        address = LineAddress(HOST, int(listener.getsockname()[1]), new_token())
        threading.Thread(target=self._serve, args=(listener, address.token), name="line", daemon=True).start()
        return address

    def _serve(self, listener: socket.socket, token: bytes) -> None:
        with listener:
            sock = self._accept(listener, token)
        with sock:
            self._socket = sock
            self._runner.push_to(self._push)
            try:
                self._listen(sock)
            except (OSError, TwoTowerError) as error:
                logger.error("the line to the cell broke: %s", error)
            finally:
                self._socket = None

    def _accept(self, listener: socket.socket, token: bytes) -> socket.socket:
        while True:
            sock, _ = listener.accept()
            sock.settimeout(GREETING_S)
            with contextlib.suppress(OSError):
                if is_token(_exactly(sock, TOKEN_BYTES), token):
                    at_once(sock)
                    sock.settimeout(self._timeout_s)
                    return sock
            sock.close()

    def _listen(self, sock: socket.socket) -> None:
        received = bytearray()
        beat_at = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= beat_at:
                self._beat()
                beat_at = now + self._beat_s
            readable, _, _ = select.select([sock], [], [], beat_at - now)
            if not readable:
                continue
            data = sock.recv(_RECEIVE_BYTES)
            if not data:
                return
            received += data
            for frame in take_frames(received):
                self._take(ORDERS.decode(frame))

    def _take(self, orders: Sequence[Order]) -> None:
        for order in orders:
            if isinstance(order, Cancel):
                self._runner.cancel([order.request_id])
                continue
            try:
                self._runner.add([order.request])
            except TwoTowerError as error:
                self._send([FailureEvent(order.request.id, error), ReleasedEvent(order.request.id)])

    def _beat(self) -> None:
        try:
            self._runner.check()
            self._send([])
        except Unavailable as error:
            self._send([Ended(str(error))])

    def _push(self, events: Sequence[Event], failure: str | None) -> None:
        if events:
            self._send(events)
        if failure is not None:
            self._send([Ended(failure)])

    def _send(self, news: Sequence[Event | Ended]) -> None:
        """From the engine's thread and the line's. A cell that does not read for `timeout_s` is a dead cell."""
        frame, too_large = framed_all(news, NEWS.encode)
        if too_large:
            frame, _ = framed_all([_failed(one) if one in too_large else one for one in news], NEWS.encode)
        with self._sending:
            sock = self._socket
            if sock is None:
                return
            try:
                sock.sendall(frame)
            except OSError as error:
                logger.error("the cell does not take events any more: %s", error)
                self._socket = None
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


def _failed(news: Event | Ended) -> Event | Ended:
    """Instead of an answer that no frame can hold."""
    if isinstance(news, Ended):
        return Ended("its reason is too long to be told")
    return FailureEvent(news.request_id, TwoTowerError("its answer is too large for one message"))


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionError("closed before the token was shown")
        data += more
    return data
