"""One end of a link: what is posted leaves in order, whichever thread sends it, and posting never waits."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from tests.exchange.rig import wait_until
from twotower.exchange.data_group import _explained
from twotower.exchange.endpoint import Endpoint, MessageStream, Outgoing
from twotower.exchange.messages import CODEC, Heartbeat
from twotower.exchange.protocol import Released
from twotower.exchange.settings import EngineHooks, LinkSettings
from twotower.exchange.staging import StagingBuffer

SETTINGS = LinkSettings(link_timeout_s=5)


class Wire:
    """A channel that keeps what it was given. `willing`: how often it can send at once."""

    def __init__(self, willing: float) -> None:
        self.willing, self.draw = willing, random.Random(0)
        self.frames: list[bytes] = []
        self.at_once = 0
        self.fault: Exception | None = None
        self.open = threading.Event()
        self.open.set()

    def send(self, frame: bytes) -> None:
        self.open.wait(5)
        self.frames.append(frame)

    def send_at_once(self, frame: bytes) -> bool:
        if self.fault is not None:
            raise self.fault
        if self.draw.random() >= self.willing:
            return False
        self.at_once += 1
        self.frames.append(frame)
        return True

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass

    def sent(self) -> list[int]:
        """Sequences of the posted messages."""
        messages = [m for frame in self.frames for m in CODEC.decode(frame) if not isinstance(m, Heartbeat)]
        return [cast(Released, message).sequence for message in messages]


class NoGroup:
    """Payloads go nowhere; `numbers` are those of their bytes, in the order they would have gone."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def send(self, buffer: StagingBuffer, nbytes: int, number: int, timeout_s: float) -> None:
        self.numbers.append(number)


@contextmanager
def sending(wire: Wire, group: NoGroup | None = None) -> Iterator[Endpoint]:
    endpoint = Endpoint("link 0", "the other side", SETTINGS, EngineHooks())
    endpoint.adopt(cast(Any, wire))
    stream = MessageStream(cast(Any, wire))
    endpoint.spawn("sender", lambda: endpoint.run_sender(stream, cast(Any, group or NoGroup()), lambda buffer: None))
    wait_until(lambda: wire.frames)  # its first heartbeat: it runs
    yield endpoint
    endpoint.close("the test is over")


@pytest.mark.parametrize("willing", [0.0, 0.5, 1.0])
def test_order_holds_whoever_sends(willing: float) -> None:
    wire = Wire(willing)
    with sending(wire) as endpoint:
        for number in range(600):
            if number % 20 == 0:
                wait_until(lambda number=number: len(wire.sent()) == number)  # a pause between bursts
            if number % 7 == 3:
                buffer = cast(StagingBuffer, object())
                endpoint.post_payload(Outgoing([Released(number)], buffer, 16, number))
            else:
                endpoint.post([Released(number)])
        wait_until(lambda: len(wire.sent()) == 600)
        assert wire.sent() == list(range(600))
        assert (wire.at_once > 0) == (willing > 0)


@pytest.mark.parametrize("willing", [0.0, 0.5, 1.0])
def test_bytes_go_in_the_order_of_their_announcements(willing: float) -> None:
    """Announced at once where possible, else by the sender with the bytes: never one before the other's turn."""
    wire, group = Wire(willing), NoGroup()
    payloads = [number for number in range(600) if number % 3 == 0]
    with sending(wire, group) as endpoint:
        for number in range(600):
            if number % 20 == 0:
                wait_until(lambda number=number: len(wire.sent()) == number)
            message = [Released(number)]
            if number in payloads:
                announced = endpoint.post_at_once(message)
                buffer = cast(StagingBuffer, object())
                endpoint.post_payload(Outgoing([] if announced else message, buffer, 16, number))
            else:
                endpoint.post(message)
        wait_until(lambda: len(wire.sent()) == 600 and len(group.numbers) == len(payloads))
        assert wire.sent() == list(range(600))
        assert group.numbers == payloads


def test_posting_does_not_wait_for_a_sender_that_does() -> None:
    wire = Wire(1.0)
    with sending(wire) as endpoint:
        wire.open.clear()
        endpoint.post_payload(Outgoing([Released(0)], cast(StagingBuffer, object()), 16, 1))
        for number in range(1, 20):
            endpoint.post([Released(number)])  # would never return if it waited for the frame before it
        assert wire.sent() == []
        wire.open.set()
        wait_until(lambda: len(wire.sent()) == 20)
        assert wire.sent() == list(range(20))


def test_an_error_in_sending_at_once_ends_the_link() -> None:
    wire = Wire(1.0)
    with sending(wire) as endpoint:
        wire.fault = ConnectionResetError()
        endpoint.post([Released(0)])
        assert endpoint.lost == "link 0: the other side is gone (connection closed)"


@pytest.mark.parametrize(
    "words", ["Read error [127.0.0.1]:1: Connection reset by peer.", "Connection closed by peer [::1]"]
)
def test_a_transfer_that_ends_with_the_other_process_says_so(words: str) -> None:
    """gloo's own words, and its advice, are for a log; the operator reads what the control channel would have said."""

    class Ends:
        def send(self, *arguments: Any) -> None:
            with _explained("broke", 5):
                raise RuntimeError(f"[pair.cc:537] {words} Check the logs of the remote worker. GLHF!\nmore lines")

    endpoint = Endpoint("link 0", "the other side", SETTINGS, EngineHooks())
    wire = Wire(1.0)
    endpoint.adopt(cast(Any, wire))
    stream = MessageStream(cast(Any, wire))
    endpoint.spawn("sender", lambda: endpoint.run_sender(stream, cast(Any, Ends()), lambda buffer: None))
    endpoint.post_payload(Outgoing([Released(0)], cast(StagingBuffer, object()), 16, 1))
    wait_until(lambda: endpoint.lost)
    assert endpoint.lost == "link 0: the other side is gone (connection closed)"
