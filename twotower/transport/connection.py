"""One end of a connection on an event loop: typed messages both ways, a beat, and one reason why it has ended.

Messages that are posted in one turn of the loop leave as one frame; an empty frame is a beat.
"""

import asyncio
import ssl
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar, cast

from twotower.errors import TwoTowerError, Unavailable
from twotower.transport.codec import Codec, CodecError, listed
from twotower.transport.frames import MOST_BYTES, Splitter, framed
from twotower.transport.handshake import (
    GREETING_BYTES,
    GREETING_S,
    About,
    Address,
    Refused,
    answer,
    hello,
    new_token,
    said,
    welcome,
)

Message = TypeVar("Message")

_BEAT_S = 1.0
_ROOM_BYTES = 1 << 20  # unsent bytes at which `room` waits
_UNSENT_BYTES = MOST_BYTES  # unsent bytes at which the connection ends
_MOST_UNKNOWN = 256  # connections without a handshake yet; beyond this number the oldest is closed
_GONE = "is gone"


class TooLarge(TwoTowerError):
    """A message that is too large for a frame."""


class Owner(Protocol[Message]):
    """The owner of an end. Called on its loop."""

    def take(self, message: Message) -> None:
        """A message has arrived. A TwoTowerError ends the connection."""
        ...

    def beat(self) -> Sequence[Message]:
        """The content of the next beat, once a second."""
        ...

    def lost(self, reason: str) -> None:
        """The connection has ended: the other end `is gone`, `has been silent for 3 s`, …. Called once."""
        ...


class Connection(asyncio.Protocol, Generic[Message]):
    """`silence_s`: after so much silence the other end is taken for dead. `lost`: why the connection has ended; None
    while it has not.

    Silence is counted in our own beats, so an end that was itself delayed does not take the other end for dead.
    """

    def __init__(self, codec: Codec[Message], owner: Owner[Message] | None, silence_s: float) -> None:
        self.lost: str | None = None
        self._codec, self._owner, self._silence_s = codec, owner, silence_s
        self._beat_s = min(_BEAT_S, silence_s / 3)
        self._unheard = 0
        self._loop = asyncio.get_running_loop()
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._timer: asyncio.TimerHandle | None = None
        self._splitter = Splitter(GREETING_BYTES)
        self.stands = False

    def post(self, message: Message) -> None:
        """Send the message after all earlier ones. Raises Unavailable if the connection has ended, and TooLarge."""
        if self.lost is not None:
            raise Unavailable(f"the other end {self.lost}")
        body = self._codec.encode(message)
        if len(body) > MOST_BYTES // 2:
            raise TooLarge(f"got a message of {len(body)} bytes, wanted at most {MOST_BYTES // 2}")
        if self._waiting_bytes + len(body) > MOST_BYTES // 2:
            self._flush()
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(body)
        self._waiting_bytes += len(body)

    @property
    def is_late(self) -> bool:
        """Whether the other end's last beat is missing."""
        return self._unheard > 1

    async def room(self) -> None:
        """Wait while more than 1 MiB is unsent. Raises Unavailable if the connection has ended."""
        await self._room.wait()
        if self.lost is not None:
            raise Unavailable(f"the other end {self.lost}")

    def close(self) -> None:
        """Send the posted messages and close the connection."""
        self._flush()
        self._end("was disconnected")
        self._transport.close()

    def abort(self, reason: str) -> None:
        """Close the connection at once, for this reason."""
        self._end(reason)
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._transport.set_write_buffer_limits(high=_ROOM_BYTES)
        self._timer = self._loop.call_later(GREETING_S, self.abort, f"has said nothing for {GREETING_S:g} s")
        self._greet()

    def data_received(self, data: bytes) -> None:
        self._unheard = 0
        try:
            for body in self._splitter.feed(data):
                if self.lost is not None:
                    return
                if not self.stands:
                    self._introduced(body)
                    continue
                assert self._owner is not None
                for message in self._codec.decode(body) if body else ():
                    self._owner.take(message)
        except (ConnectionError, TwoTowerError) as error:
            self.abort(f"sent an unknown message: {error}" if isinstance(error, CodecError) else str(error))

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._end(_GONE)

    def _greet(self) -> None:
        """Send the first frame, if this end connects."""

    def _introduced(self, body: bytes) -> None:
        """The other end's first frame."""
        raise NotImplementedError

    def _opened(self) -> None:
        self.stands, self._splitter.most_bytes = True, MOST_BYTES
        self._stop_timer()
        self._beat()

    def _beat(self) -> None:
        if self._unheard * self._beat_s > self._silence_s - self._beat_s / 2:
            self.abort(f"has been silent for {self._silence_s:g} s")
            return
        self._unheard += 1
        assert self._owner is not None
        for message in self._owner.beat():
            self.post(message)
        self._flush(beat=True)
        if self.lost is None:
            self._timer = self._loop.call_later(self._beat_s, self._beat)

    def _flush(self, beat: bool = False) -> None:
        if self.lost is not None or not (self._waiting or beat):
            return
        self._transport.write(framed(listed(self._waiting) if self._waiting else b""))
        self._waiting, self._waiting_bytes = [], 0
        if self._transport.get_write_buffer_size() > _UNSENT_BYTES:
            self.abort("does not read what it is sent")

    def _end(self, reason: str) -> None:
        if self.lost is None:
            self.lost = reason
            self._waiting.clear()
            self._stop_timer()
            self._room.set()
            if self.stands and self._owner is not None:
                self._owner.lost(reason)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class _Caller(Connection[Message]):
    """The end that connects."""

    def __init__(
        self, codec: Codec[Message], owner: Owner[Message], silence_s: float, address: Address, about: About
    ) -> None:
        super().__init__(codec, owner, silence_s)
        self._hello = hello(address, about)
        self.welcomed: asyncio.Future[About] = self._loop.create_future()

    def _greet(self) -> None:
        self._transport.write(said(self._hello))

    def _introduced(self, body: bytes) -> None:
        about = welcome(body)
        self._opened()
        if not self.welcomed.done():
            self.welcomed.set_result(about)

    def _end(self, reason: str) -> None:
        super()._end(reason)
        if not self.welcomed.done():
            self.welcomed.set_exception(Unavailable(reason))


async def connect(
    address: Address,
    about: About,
    codec: Codec[Message],
    owner: Owner[Message],
    *,
    silence_s: float,
    timeout_s: float = GREETING_S,
    tls: ssl.SSLContext | None = None,
) -> tuple[Connection[Message], About]:
    """An open connection, and the other end's description. Raises Unavailable."""
    loop, where = asyncio.get_running_loop(), f"{address.host}:{address.port}"
    made: _Caller[Message] | None = None
    try:
        async with asyncio.timeout(timeout_s):
            _, made = await loop.create_connection(
                lambda: _Caller(codec, owner, silence_s, address, about), address.host, address.port, ssl=tls
            )
            return made, await asyncio.shield(made.welcomed)
    except TimeoutError:
        raise Unavailable(f"{where} has not answered within {timeout_s:g} s") from None
    except OSError as error:
        raise Unavailable(f"{where} cannot be reached: {error}") from error
    except Unavailable as error:
        raise Unavailable(f"{where} {error}") from None
    finally:
        if made is not None and not made.stands:
            made.close()
            made.welcomed.exception()  # somebody has seen it


# Called with a peer's description when a peer with the token has connected. Returns the owner of this end, and our
# description for the peer. A TwoTowerError refuses the peer and says why.
Accept = Callable[[Connection[Message], About], tuple[Owner[Message], About]]


class _Callee(Connection[Message]):
    """The end that was connected to."""

    def __init__(
        self,
        codec: Codec[Message],
        silence_s: float,
        token: str,
        accept: Accept[Message],
        unknown: "dict[_Callee[Message], None]",
    ) -> None:
        """`unknown`: all connections of this listener without a handshake yet, the oldest first."""
        super().__init__(codec, None, silence_s)
        self._token, self._accept, self._unknown = token, accept, unknown

    def _greet(self) -> None:
        self._unknown[self] = None
        if len(self._unknown) > _MOST_UNKNOWN:
            next(iter(self._unknown)).abort("has not sent its handshake, and newer connections replaced it")

    def _introduced(self, body: bytes) -> None:
        reply = answer(body, self._token, self._admit)
        self._transport.write(said(reply))
        if isinstance(reply, Refused):
            self.close()
        else:
            self._unknown.pop(self, None)
            self._opened()

    def _end(self, reason: str) -> None:
        self._unknown.pop(self, None)
        super()._end(reason)

    def _admit(self, about: About) -> About:
        self._owner, told = self._accept(self, about)
        return told


class Listener:
    """Accepts connections. After `close` existing connections continue."""

    def __init__(self, server: asyncio.Server, address: Address) -> None:
        self._server, self.address = server, address

    def close(self) -> None:
        """Accept no further connections."""
        self._server.close()


async def listen(
    host: str,
    codec: Codec[Message],
    accept: Accept[Message],
    *,
    silence_s: float,
    tls: ssl.SSLContext | None = None,
) -> Listener:
    """Listen on a free port of `host`, an address of this machine, for peers with the token."""
    token, unknown = new_token(), dict[_Callee[Message], None]()
    server = await asyncio.get_running_loop().create_server(
        lambda: _Callee(codec, silence_s, token, accept, unknown),
        host,
        0,
        ssl=tls,
        ssl_handshake_timeout=GREETING_S if tls else None,
    )
    return Listener(server, Address(host, int(server.sockets[0].getsockname()[1]), token))
