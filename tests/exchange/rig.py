"""Both ends of an exchange and a scripted context engine, driven by the test's own thread."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.exchange.scripted import ScriptedContext, mirrored, new_cache, same, state_after
from twotower.exchange.control import Channel
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.local import LocalExchange
from twotower.exchange.protocol import Command, Delta, Link, LinkEvent, LinkLost, Port
from twotower.exchange.settings import LinkSettings
from twotower.model.cache import TowerCache
from twotower.testing import ChannelFaults, FaultyChannel

KINDS = ("local", "distributed", "faulty")
QUICK = LinkSettings(link_timeout_s=10, setup_timeout_s=20, staging_bytes=1 << 16)
# Nothing is lost, so everything must still be right.
HARMLESS = ChannelFaults(delay_s=0.002)


def wait_until(condition: Callable[[], object], timeout_s: float = 5) -> float:
    """Seconds until the condition held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"waited {timeout_s} s in vain"
        time.sleep(0.002)
    return time.monotonic() - started


@dataclass
class Rig:
    link: Link
    port: Port
    engine: ScriptedContext
    events: list[LinkEvent] = field(default_factory=list)

    def run(self, until: Callable[[list[LinkEvent]], bool], timeout_s: float = 10) -> list[LinkEvent]:
        """Tick both sides until what came satisfies `until`; what came since the last run."""
        seen: list[LinkEvent] = []
        deadline = time.monotonic() + timeout_s
        while True:
            self.engine.tick()
            seen += self.link.poll()
            self.link.submit(())
            if until(seen):
                self.events += seen
                return seen
            assert time.monotonic() < deadline, f"waited {timeout_s} s in vain, got {seen}"
            time.sleep(0.001)

    def call(self, *commands: Command, replies: int = 1) -> list[LinkEvent]:
        """Submit and wait for this many replies."""
        self.link.submit(commands)
        return self.run(lambda seen: len(seen) >= replies)

    def tick_until(self, condition: Callable[[], bool]) -> None:
        """Let the context engine work, without taking anything at the link."""

        def ticked() -> bool:
            self.engine.tick()
            return condition()

        wait_until(ticked)

    def delta(self, *commands: Command) -> Delta:
        """Submit one command and wait for the delta that completes its answer."""
        self.link.submit(commands)
        last = self.run(lambda seen: any(isinstance(e, Delta) and e.complete for e in seen))[-1]
        assert isinstance(last, Delta)
        return last

    def mirrors(self, delta: Delta) -> bool:
        """The mirror holds what the context tower made of the sequence so far, bit for bit."""
        assert self.link.cache.length(delta.slot) == delta.end
        return same(mirrored(self.link.cache, delta.slot), state_after(self.link.cache, delta.sequence, delta.end))

    def close(self) -> None:
        self.link.close()
        self.port.close()


def wrapper(faults: ChannelFaults | None) -> Callable[[Channel], Channel]:
    return lambda channel: channel if faults is None else FaultyChannel(channel, faults)


def distributed_rig(
    settings: LinkSettings = QUICK,
    cache: TowerCache | None = None,
    mirror: TowerCache | None = None,
    epoch: int = 0,
    port_faults: ChannelFaults | None = None,
    link_faults: ChannelFaults | None = None,
) -> Rig:
    cache = cache or new_cache()
    port, address = open_port(cache, 0, epoch, settings, wrap_channel=wrapper(port_faults))
    link = connect(address, mirror or new_cache(), wrap_channel=wrapper(link_faults))
    return Rig(link, port, ScriptedContext(port, cache))


def rig_of(kind: str, slots: int = 8, pages: int = 64, settings: LinkSettings = QUICK) -> Rig:
    """A rig of one of KINDS with a context cache of this size; the mirror of a distributed one has room enough."""
    cache = new_cache(slots, pages)
    if kind == "local":
        exchange = LocalExchange(cache, lambda: None)
        return Rig(exchange.link, exchange.port, ScriptedContext(exchange.port, cache))
    faults = HARMLESS if kind == "faulty" else None
    return distributed_rig(settings, cache, new_cache(32, 256), port_faults=faults, link_faults=faults)


def losses(events: Sequence[LinkEvent]) -> list[str]:
    return [event.reason for event in events if isinstance(event, LinkLost)]
