"""A link whose other side dies, hangs or misbehaves: noticed in time, said in one sentence, mended."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.exchange import other_side
from tests.exchange.rig import QUICK, Rig, distributed_rig, losses, wait_until
from tests.exchange.scripted import ScriptedContext, mirrored, new_cache, same, state_after
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.protocol import Commit, Delta, Link, LinkEvent, Prefill
from twotower.exchange.settings import EngineHooks, LinkSettings
from twotower.testing import ChannelFaults

pytestmark = pytest.mark.slow  # other processes, and waiting for what does not come

PATIENCE_S = 1.2
IMPATIENT = replace(QUICK, link_timeout_s=PATIENCE_S, stall_timeout_s=PATIENCE_S)


def _tokens(count: int) -> tuple[int, ...]:
    return tuple(range(4, 4 + count))


@contextmanager
def _other_side(side: str, settings: LinkSettings) -> Iterator["subprocess.Popen[str]"]:
    with other_side.start(side, settings) as process:
        try:
            yield process
        finally:
            process.kill()


def _wait_for(link: Link, count: int, timeout_s: float = 10) -> list[LinkEvent]:
    events: list[LinkEvent] = []

    def enough() -> bool:
        events.extend(link.poll())
        link.submit(())
        return len(events) >= count

    wait_until(enough, timeout_s)
    return events


def test_two_processes_exchange_and_a_killed_context_side_is_noticed() -> None:
    with _other_side("context", QUICK) as process:
        link = connect(other_side.read_address(process), new_cache())
        link.submit([Prefill(n, _tokens(n * 9), 64) for n in (1, 2, 3)])
        deltas = {e.sequence: e for e in _wait_for(link, 5) if isinstance(e, Delta)}
        link.submit([Commit(n, n * 9, _tokens(16)) for n in (1, 2, 3)])
        deltas |= {e.sequence: e for e in _wait_for(link, 3) if isinstance(e, Delta)}
        for n, delta in deltas.items():
            assert delta.end == n * 9 + 16
            assert same(mirrored(link.cache, delta.slot), state_after(link.cache, n, delta.end))
        link.submit([Commit(n, n * 9 + 16, _tokens(4)) for n in (1, 2, 3)])
        process.kill()
        killed = time.monotonic()
        events: list[LinkEvent] = []
        while not losses(events):
            events += _wait_for(link, 1, timeout_s=2)
        assert time.monotonic() - killed < 2
        assert losses(events)[0].startswith("link 0 epoch 0: ")
        link.close()


def test_a_killed_denoiser_side_is_noticed() -> None:
    port, address = open_port(new_cache(), 0, 0, replace(QUICK, setup_timeout_s=60))
    with _other_side("denoiser", QUICK) as process:
        other_side.write_address(process, address)
        wait_until(lambda: port._pool, timeout_s=30)
        process.kill()
        wait_until(lambda: port.lost, timeout_s=2)
        assert port.lost == "link 0 epoch 0: the denoiser side is gone (connection closed)"
    port.close()


@pytest.mark.parametrize("in_flight", [False, True], ids=["idle", "while a delta is due"])
def test_a_stopped_context_side_is_noticed_in_time(in_flight: bool) -> None:
    with _other_side("context", IMPATIENT) as process:
        link = connect(other_side.read_address(process), new_cache())
        link.submit([Prefill(1, _tokens(9), 64)])
        _wait_for(link, 1)
        os.kill(process.pid, signal.SIGSTOP)
        if in_flight:
            link.submit([Commit(1, 9, _tokens(16))])
        stopped = time.monotonic()
        events = _wait_for(link, 1, timeout_s=PATIENCE_S + 1)
        assert losses(events) == [f"link 0 epoch 0: nothing heard from the context side for {PATIENCE_S} s"]
        assert time.monotonic() - stopped < PATIENCE_S + 1
        link.close()
        assert time.monotonic() - stopped < PATIENCE_S + 2


def test_an_engine_that_stands_still_is_as_good_as_dead() -> None:
    port, address = open_port(new_cache(), 0, 0, IMPATIENT, EngineHooks(progress=lambda: 7))
    link = connect(address, new_cache())
    (reason,) = losses(_wait_for(link, 1, timeout_s=PATIENCE_S + 1.5))
    assert reason.startswith("link 0 epoch 0: the context side is alive but its engine has made no progress for ")
    link.close()
    port.close()


def _lost_by(port_faults: ChannelFaults | None = None, link_faults: ChannelFaults | None = None) -> tuple[Rig, str]:
    """A rig that commits until its link is lost, and the reason."""
    rig = distributed_rig(IMPATIENT, port_faults=port_faults, link_faults=link_faults)
    rig.link.submit([Prefill(1, (), 64)])
    deadline = time.monotonic() + PATIENCE_S + 1.5
    while not (lost := losses(rig.events)):
        assert time.monotonic() < deadline
        rig.run(bool, timeout_s=PATIENCE_S + 1.5)
        last = rig.events[-1]
        if isinstance(last, Delta) and last.end < 64:
            assert rig.mirrors(last)
            rig.link.submit([Commit(1, last.end, _tokens(1))])
    wait_until(lambda: rig.port.lost)
    return rig, lost[0]


def test_a_payload_that_was_never_announced_ends_the_link_in_time() -> None:
    rig, reason = _lost_by(ChannelFaults(drop_payload=3))
    # The next frame tells, or an end's patience does: which comes first is chance.
    reasons = f"{reason}; {rig.port.lost}"
    rig.close()
    told = "a transfer did not finish within 1.2 s", "nothing heard from"
    assert any(words in reasons for words in told), reasons


@pytest.mark.parametrize("side", ["port", "link"])
def test_a_cut_connection_ends_the_link_at_once(side: str) -> None:
    started = time.monotonic()
    faults = ChannelFaults(cut_at=5)
    rig, reason = _lost_by(*((faults, None) if side == "port" else (None, faults)))
    assert reason == "link 0 epoch 0: the context side is gone (connection closed)"
    assert rig.port.lost == "link 0 epoch 0: the denoiser side is gone (connection closed)"
    assert time.monotonic() - started < PATIENCE_S
    rig.close()


@pytest.mark.parametrize("side", ["context", "denoiser"])
def test_a_channel_gone_silent_ends_the_link_in_time(side: str) -> None:
    faults = ChannelFaults(stall_at=5)
    rig, reason = _lost_by(*((faults, None) if side == "context" else (None, faults)))
    reasons = f"{reason}; {rig.port.lost}"
    assert f"nothing heard from the {side} side" in reasons or "a transfer did not finish" in reasons
    rig.close()


def test_after_a_loss_the_next_epoch_serves_the_same_caches() -> None:
    cache, mirror = new_cache(), new_cache()
    for epoch in range(3):
        rig = distributed_rig(QUICK, cache, mirror, epoch, port_faults=ChannelFaults(cut_at=5))
        lost: list[str] = []
        rig.link.submit([Prefill(1, (), 64)])
        while not lost:
            seen = rig.run(bool)
            lost = losses(seen)
            if isinstance(seen[-1], Delta):
                assert rig.mirrors(seen[-1])
                rig.link.submit([Commit(1, seen[-1].end, _tokens(1))])
        assert lost[0].startswith(f"link 0 epoch {epoch}: ")
        cache.free(rig.engine.slots[1])
        rig.close()
    assert (mirror.room.free_slots, mirror.room.free_pages) == (8, 64)


def test_a_transfer_to_a_link_that_is_gone_does_not_hold_the_port() -> None:
    cache = new_cache()
    port, address = open_port(cache, 0, 0, IMPATIENT)
    link = connect(address, new_cache())
    rig = Rig(link, port, ScriptedContext(port, cache))
    link.submit([Prefill(n, _tokens(30), 30) for n in range(1, 6)])
    rig.tick_until(lambda: len(rig.engine.histories) == 5)
    started = time.monotonic()
    link.close()
    wait_until(lambda: port.lost)
    port.send([])
    port.close()
    assert time.monotonic() - started < 1
