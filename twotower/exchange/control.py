"""A link's control connection: framed, authenticated TCP on one host address; every wait in it has a deadline.

`multiprocessing.connection` does framing and authentication; its pickling halves are never used. The kernel holds
the deadlines (SO_RCVTIMEO, SO_SNDTIMEO): a read or write that lasts longer raises BlockingIOError.
Knows nothing of what a frame says.
"""

import contextlib
import os
import secrets
import select
import socket
import struct
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any, Protocol

_MAX_FRAME_BYTES = 64 << 20
_SMALL_BYTES = 4096
_HANDSHAKE_S = 5.0


class Channel(Protocol):
    """Frames in order, both ways. Errors are OSError and EOFError."""

    def send(self, frame: bytes) -> None: ...

    def send_at_once(self, frame: bytes) -> bool:
        """Send a frame if that needs no waiting; False where it might, and nothing was sent."""
        ...

    def receive(self) -> bytes: ...

    def set_timeout(self, seconds: float) -> None:
        """How long `send` and `receive` may wait: then TimeoutError."""
        ...

    def abort(self) -> None:
        """Wake whoever waits in `send` or `receive`, at both ends, with an error. From any thread."""
        ...

    def close(self) -> None:
        """Give the descriptor back. Only when nobody waits any more."""
        ...


class SocketChannel:
    """A Channel over a connected TCP socket, which it takes over. Each of its two objects closes a descriptor."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        sock.setblocking(True)
        # A header and its body leave at once: Nagle's algorithm would hold the second until the first is acknowledged.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self.set_timeout(timeout_s)
        self._connection: Connection[Any, Any] = Connection(os.dup(sock.fileno()))
        self._room = select.poll()
        self._room.register(sock.fileno(), select.POLLOUT)

    def set_timeout(self, seconds: float) -> None:
        whole = int(seconds)
        timeval = struct.pack("@ll", whole, max(int((seconds - whole) * 1e6), 1))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def send(self, frame: bytes) -> None:
        try:
            self._connection.send_bytes(frame)
        except BlockingIOError as error:
            raise TimeoutError("a control message could not be sent") from error

    def send_at_once(self, frame: bytes) -> bool:
        # A socket that polls as writable has room for far more than this.
        if len(frame) > _SMALL_BYTES or not self._room.poll(0):
            return False
        self.send(frame)
        return True

    def receive(self) -> bytes:
        try:
            return self._connection.recv_bytes(_MAX_FRAME_BYTES)
        except BlockingIOError as error:
            raise TimeoutError("no control message came") from error

    def prove(self, authkey: bytes, dialled: bool) -> None:
        """Show each other that both know the key. Raises AuthenticationError."""
        try:
            for turn in (answer_challenge, deliver_challenge) if dialled else (deliver_challenge, answer_challenge):
                turn(self._connection, authkey)
        except BlockingIOError as error:
            raise TimeoutError("no answer to the authentication challenge") from error

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
        with contextlib.suppress(OSError):
            self._connection.close()


class Listener:
    """Waits for the one peer that knows the key."""

    def __init__(self, host: str) -> None:
        self.authkey = secrets.token_bytes(32)
        self._socket = socket.create_server((host, 0), backlog=4)
        self.port = int(self._socket.getsockname()[1])

    def accept(self, deadline: float) -> SocketChannel:
        """The next connection that proves itself. Raises TimeoutError at `deadline` (monotonic), OSError if closed."""
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            sock, _ = self._socket.accept()
            channel = SocketChannel(sock, min(left, _HANDSHAKE_S))
            try:
                channel.prove(self.authkey, dialled=False)
            except (AuthenticationError, OSError, EOFError):
                channel.close()
                continue
            return channel
        raise TimeoutError("nobody connected")

    def abort(self) -> None:
        """Wake whoever waits in `accept`."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def dial(host: str, port: int, authkey: bytes, timeout_s: float) -> SocketChannel:
    """Connect to a Listener. Raises OSError, EOFError or AuthenticationError."""
    channel = SocketChannel(socket.create_connection((host, port), timeout=timeout_s), timeout_s)
    try:
        channel.prove(authkey, dialled=True)
    except BaseException:
        channel.close()
        raise
    return channel
