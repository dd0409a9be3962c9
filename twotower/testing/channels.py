"""A control channel with faults."""

import time
from dataclasses import dataclass

from twotower.exchange.control import Channel
from twotower.exchange.messages import CODEC, Payload


@dataclass(frozen=True, slots=True)
class ChannelFaults:
    """What goes wrong with the frames one end of a link sends, counted from 0, after the handshake.

    `drop_payload`: the frame that announces this payload is not sent. `cut_at`: the connection ends instead of this
    frame.
    `stall_at`: from this frame on nothing is sent, and nobody is told.
    """

    delay_s: float = 0.0
    drop_payload: int | None = None
    cut_at: int | None = None
    stall_at: int | None = None


class FaultyChannel:
    """A control channel with faults. `sent` counts the frames it was given."""

    def __init__(self, inner: Channel, faults: ChannelFaults) -> None:
        self._inner, self._faults = inner, faults
        self.sent = 0

    def send(self, frame: bytes) -> None:
        faults, number = self._faults, self.sent
        self.sent += 1
        time.sleep(faults.delay_s)
        if number == faults.cut_at:
            self._inner.abort()
        if faults.stall_at is not None and number >= faults.stall_at:
            return
        if not self._announces(frame, faults.drop_payload):
            self._inner.send(frame)

    def send_at_once(self, frame: bytes) -> bool:
        if self._faults.delay_s:
            return False
        self.send(frame)
        return True

    @staticmethod
    def _announces(frame: bytes, payload: int | None) -> bool:
        if payload is None or b"Payload" not in frame:
            return False
        return any(isinstance(m, Payload) and m.number == payload for m in CODEC.decode(frame))

    def receive(self) -> bytes:
        return self._inner.receive()

    def set_timeout(self, seconds: float) -> None:
        self._inner.set_timeout(seconds)

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()
