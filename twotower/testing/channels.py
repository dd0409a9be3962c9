"""A control channel with faults."""

import time
from dataclasses import dataclass

from twotower.exchange.codec import Payload, decode
from twotower.exchange.control import Channel


@dataclass(frozen=True, slots=True)
class ChannelFaults:
    """What goes wrong with the frames one end of a link sends, counted from 0, which is its introduction.

    `overtake`: these frames are sent after the next one. `drop_payload`: the frame that announces this payload is not
    sent. `cut_at`: the connection ends instead of this frame.
    `stall_at`: from this frame on nothing is sent, and nobody is told.
    """

    delay_s: float = 0.0
    repeat_every: int = 0
    drop: frozenset[int] = frozenset()
    drop_payload: int | None = None
    overtake: frozenset[int] = frozenset()
    cut_at: int | None = None
    stall_at: int | None = None


class FaultyChannel:
    """A control channel with faults. `sent` counts the frames it was given."""

    def __init__(self, inner: Channel, faults: ChannelFaults) -> None:
        self._inner, self._faults = inner, faults
        self._held: bytes | None = None
        self.sent = 0

    def send(self, frame: bytes) -> None:
        faults, number = self._faults, self.sent
        self.sent += 1
        time.sleep(faults.delay_s)
        if number == faults.cut_at:
            self._inner.abort()
        if faults.stall_at is not None and number >= faults.stall_at:
            return
        if number in faults.drop or self._announces(frame, faults.drop_payload):
            return
        if number in faults.overtake:
            self._held = frame
            return
        self._inner.send(frame)
        if self._held is not None:
            self._inner.send(self._held)
            self._held = None
        if faults.repeat_every and number % faults.repeat_every == 0:
            self._inner.send(frame)

    def send_at_once(self, frame: bytes) -> bool:
        if self._faults.delay_s:
            return False
        self.send(frame)
        return True

    @staticmethod
    def _announces(frame: bytes, payload: int | None) -> bool:
        if payload is None or b'"Payload"' not in frame:
            return False
        return any(isinstance(m, Payload) and m.number == payload for m in decode(frame)[1])

    def receive(self) -> bytes:
        return self._inner.receive()

    def set_timeout(self, seconds: float) -> None:
        self._inner.set_timeout(seconds)

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()
