"""A link's control connection: frames over TCP on one host address, for threads; every wait in it has a deadline.

The kernel holds the deadlines (SO_RCVTIMEO, SO_SNDTIMEO): a read or write that lasts longer raises BlockingIOError.
Knows nothing of a frame's content, except for the handshake.
"""

import contextlib
import select
import socket
import struct
import time
from collections import deque
from typing import Protocol

from twotower.errors import TwoTowerError
from twotower.transport.frames import MOST_BYTES, Splitter, framed
from twotower.transport.handshake import (
    GREETING_BYTES,
    GREETING_S,
    About,
    Address,
    Admit,
    Refused,
    answer,
    hello,
    new_token,
    said,
    welcome,
)

_SMALL_BYTES = 4096
_RECEIVE_BYTES = 1 << 16


class Channel(Protocol):
    """Frames in order, both ways. Errors are OSError and EOFError."""

    def send(self, frame: bytes) -> None: ...

    def send_at_once(self, frame: bytes) -> bool:
        """Send a frame if that needs no waiting; False if it might, and then nothing was sent."""
        ...

    def receive(self) -> bytes: ...

    def set_timeout(self, seconds: float) -> None:
        """How long `send` and `receive` may wait before TimeoutError."""
        ...

    def abort(self) -> None:
        """End all waits in `send` and `receive`, at both ends, with an error. From any thread."""
        ...

    def close(self) -> None:
        """Close the descriptor. Only when no thread waits any more."""
        ...


class SocketChannel:
    """A Channel over a connected TCP socket, which it takes over."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        sock.setblocking(True)
        # Small frames leave without waiting for the acknowledgement of the one before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self.set_timeout(timeout_s)
        self._room = select.poll()
        self._room.register(sock.fileno(), select.POLLOUT)
        self._splitter = Splitter(GREETING_BYTES)
        self._received: deque[bytes] = deque()

    def opened(self) -> None:
        """The handshake is done: frames may be longer."""
        self._splitter.most_bytes = MOST_BYTES

    def set_timeout(self, seconds: float) -> None:
        whole = int(seconds)
        timeval = struct.pack("@ll", whole, max(int((seconds - whole) * 1e6), 1))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def send(self, frame: bytes) -> None:
        self.write(framed(frame))

    def write(self, data: bytes) -> None:
        """Write a complete frame."""
        try:
            self._socket.sendall(data)
        except BlockingIOError as error:
            raise TimeoutError("a control message could not be sent") from error

    def send_at_once(self, frame: bytes) -> bool:
        # A socket that polls as writable has room for far more than this.
        if len(frame) > _SMALL_BYTES or not self._room.poll(0):
            return False
        self.send(frame)
        return True

    def receive(self) -> bytes:
        while not self._received:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError as error:
                raise TimeoutError("no control message came") from error
            if not data:
                raise EOFError("the connection was closed")
            self._received += self._splitter.feed(data)
        return self._received.popleft()

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class Listener:
    """Waits for the one peer that has the token and is admitted."""

    def __init__(self, host: str) -> None:
        self._socket = socket.create_server((host, 0), backlog=4)
        self.address = Address(host, int(self._socket.getsockname()[1]), new_token())

    def accept(self, deadline: float, admit: Admit) -> SocketChannel:
        """The next peer that `admit` accepts. Raises TimeoutError at `deadline` (monotonic), OSError if closed."""
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            sock, _ = self._socket.accept()
            channel = SocketChannel(sock, min(left, GREETING_S))
            with contextlib.suppress(OSError, EOFError):
                reply = answer(channel.receive(), self.address.token, admit)
                channel.write(said(reply))
                if not isinstance(reply, Refused):
                    channel.opened()
                    return channel
            channel.close()
        raise TimeoutError("nobody connected")

    def abort(self) -> None:
        """End a wait in `accept`."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def dial(address: Address, about: About, timeout_s: float) -> tuple[SocketChannel, About]:
    """Connect to a Listener; returns the channel and the listener's description. Raises OSError, EOFError or a
    TwoTowerError.
    """
    channel = SocketChannel(socket.create_connection((address.host, address.port), timeout=timeout_s), timeout_s)
    try:
        channel.write(said(hello(address, about)))
        told = welcome(channel.receive())
    except (OSError, EOFError, TwoTowerError):
        channel.close()
        raise
    channel.opened()
    return channel, told
