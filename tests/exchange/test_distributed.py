"""What only the exchange between processes does: wire dtypes, the mirror's guard, introductions, resources."""

import dataclasses
import gc
import pickle
import socket
import threading
import time
from collections.abc import Sequence
from functools import partial

import psutil
import pytest
import torch

from tests.exchange.rig import QUICK, Rig, distributed_rig, wait_until
from tests.exchange.scripted import CONFIG, ScriptedContext, mirrored, new_cache, same, state_after
from twotower.errors import ConfigError, LinkDown, Overloaded
from twotower.exchange.data_group import DataGroup, choose_backend
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.distributed_link import DistributedLink
from twotower.exchange.distributed_port import DistributedPort
from twotower.exchange.messages import Message, Payload
from twotower.exchange.protocol import Commit, Delta, Failed, LinkEvent, Prefill, Release, Released
from twotower.exchange.settings import SSM_WIRE_DTYPES, EngineHooks, LinkSettings
from twotower.exchange.staging import DeltaLayout, StagingBuffer
from twotower.model.scaled import Scaled


def _tokens(count: int) -> tuple[int, ...]:
    return tuple(range(4, 4 + count))


def test_bfloat16_on_the_wire_rounds_the_ssm_states_and_nothing_else() -> None:
    rig = distributed_rig(dataclasses.replace(QUICK, ssm_wire_dtype="bfloat16"))
    delta = rig.delta(Prefill(1, _tokens(9), 16))
    got, sent = mirrored(rig.link.cache, delta.slot), state_after(rig.link.cache, 1, 9)
    assert same(got[:3], sent[:3])
    assert torch.equal(got[3], sent[3].to(torch.bfloat16).float())
    assert got[3].dtype == torch.float32
    torch.testing.assert_close(got[3], sent[3], rtol=2**-8, atol=0)
    rig.close()


def _rounded(ssm: torch.Tensor, wire: str) -> torch.Tensor:
    held = Scaled(torch.empty(ssm.shape, dtype=getattr(torch, wire)), torch.empty(ssm.shape[:-1]))
    held.hold(ssm.clone())
    return held.to(torch.float32)


@pytest.mark.parametrize("wire", ["int8", "float8_e4m3fn"])
def test_eight_bits_on_the_wire_round_each_commits_states_once(wire: str) -> None:
    """The mirror's state is the context tower's, rounded, after any number of commits: nothing accumulates."""
    rig = distributed_rig(dataclasses.replace(QUICK, ssm_wire_dtype=wire))
    delta = rig.delta(Prefill(1, _tokens(9), 64))
    for start in (9, 12, 15, 18):
        delta = rig.delta(Commit(1, start, _tokens(3)))
    got, sent = mirrored(rig.link.cache, delta.slot), state_after(rig.link.cache, 1, 21)
    assert same(got[:3], sent[:3])
    assert got[3].dtype == torch.float32 and not torch.equal(got[3], sent[3])
    assert torch.equal(got[3], _rounded(sent[3], wire))
    rig.close()


@pytest.mark.parametrize("wire", ["int8", "float8_e4m3fn"])
def test_of_a_payload_in_eight_bits_only_the_wanted_sequences_are_written(wire: str) -> None:
    rig = distributed_rig(dataclasses.replace(QUICK, ssm_wire_dtype=wire))
    rig.link.submit([Prefill(number, _tokens(3), 16) for number in (1, 2, 3)])
    deltas = {event.sequence: event for event in rig.run(lambda seen: len(seen) == 3) if isinstance(event, Delta)}
    rig.link.submit([Commit(number, 3, _tokens(4)) for number in (1, 2, 3)])
    rig.link.submit([Release(2)])
    rig.run(lambda seen: len(seen) == 3)
    for number in (1, 3):
        got = mirrored(rig.link.cache, deltas[number].slot)[3]
        assert torch.equal(got, _rounded(state_after(rig.link.cache, number, 7)[3], wire))
    rig.close()


def test_a_mirror_that_expects_another_wire_is_refused() -> None:
    port, address = open_port(new_cache(), 0, 0, dataclasses.replace(QUICK, ssm_wire_dtype="int8"))
    settings = dataclasses.replace(address.settings, ssm_wire_dtype="float8_e4m3fn")
    with pytest.raises(LinkDown, match="layout: got"):
        connect(dataclasses.replace(address, settings=settings), new_cache())
    port.close()


def test_the_bytes_of_a_state_on_the_wire() -> None:
    """A scale for each channel of 128 numbers is a 32nd of them."""
    cache = new_cache(config=dataclasses.replace(CONFIG, hybrid_override_pattern="MM", ssm_state_size=128))
    sizes = {wire: DeltaLayout(cache, wire).nbytes([Delta(0, 0, 16, 0)]) for wire in SSM_WIRE_DTYPES}
    numbers = cache.ssm[:, 0].numel()
    least = sizes["float32"] - 4 * numbers
    assert {wire: size - least for wire, size in sizes.items()} == {
        "float32": 4 * numbers,
        "bfloat16": 2 * numbers,
        "int8": numbers + numbers // 32,
        "float8_e4m3fn": numbers + numbers // 32,
    }


def test_the_mirror_is_untouched_by_a_mamba_state_until_the_prompt_is_read() -> None:
    rig = distributed_rig(dataclasses.replace(QUICK, staging_buffers=1, staging_bytes=64))  # a delta a payload
    rig.link.submit([Prefill(1, _tokens(20), 20)])
    first = rig.run(lambda seen: bool(seen))
    assert len(first) == 1 and isinstance(first[0], Delta) and not first[0].complete
    assert not rig.link.cache.ssm[:, first[0].slot].any()
    last = rig.run(lambda seen: any(isinstance(event, Delta) and event.complete for event in seen))[-1]
    assert isinstance(last, Delta) and rig.mirrors(last)
    rig.close()


def test_a_full_mirror_raises_overloaded_and_submits_nothing() -> None:
    rig = distributed_rig(mirror=new_cache(slots=2, pages=8))
    with pytest.raises(Overloaded):
        rig.link.submit([Prefill(1, (), 8), Prefill(2, (), 8), Prefill(3, (), 8)])
    assert rig.link.cache.room.free_slots == 2
    assert [event.sequence for event in rig.call(Prefill(4, (), 8)) if isinstance(event, Delta)] == [4]
    assert list(rig.engine.histories) == [4]
    rig.close()


def test_a_mirror_slot_is_reused_only_after_both_sides_released_it() -> None:
    rig = distributed_rig(mirror=new_cache(slots=1, pages=4))
    rig.delta(Prefill(1, _tokens(3), 8))
    rig.link.submit([Release(1)])
    with pytest.raises(Overloaded):
        rig.link.submit([Prefill(2, (), 8)])
    assert rig.run(lambda seen: bool(seen)) == [Released(1)]
    assert rig.mirrors(rig.delta(Prefill(2, _tokens(4), 8)))
    rig.close()


def test_a_delta_on_its_way_when_its_sequence_is_released_is_discarded() -> None:
    rig = distributed_rig(mirror=new_cache(slots=1, pages=4))
    rig.delta(Prefill(1, _tokens(3), 16))
    rig.link.submit([Commit(1, 3, _tokens(5))])
    rig.tick_until(lambda: len(rig.engine.histories[1]) == 8)
    wait_until(lambda: rig.link._inbox)  # type: ignore[attr-defined]
    rig.link.submit([Release(1)])
    assert rig.link.poll() == []
    assert rig.run(lambda seen: bool(seen)) == [Released(1)]
    assert rig.mirrors(rig.delta(Prefill(2, _tokens(4), 16))), "the slot's next tenant has nothing of it"
    rig.close()


def test_a_delta_is_written_beside_the_engine_unless_it_reads_the_sequence() -> None:
    rig = distributed_rig()
    link = rig.link
    slot = rig.delta(Prefill(1, _tokens(3), 64)).slot
    for start, reading in ((3, False), (8, True), (13, False)):
        before = mirrored(link.cache, slot)
        link.submit([Commit(1, start, _tokens(5))], reading)
        rig.tick_until(lambda start=start: len(rig.engine.histories[1]) == start + 5)  # type: ignore[misc]
        wait_until(lambda: link._inbox)  # type: ignore[attr-defined]
        assert link.cache.length(slot) == start, "counted before anybody was told"
        assert same(mirrored(link.cache, slot), before) == reading
        (delta,) = link.poll()
        link.submit(())
        assert isinstance(delta, Delta) and delta.end == start + 5 and rig.mirrors(delta)
    rig.close()


def _started(settings: LinkSettings = QUICK) -> tuple[Rig, int]:
    rig = distributed_rig(settings)
    rig.delta(Prefill(1, _tokens(8), 16))
    return rig, rig.engine.slots[1]


@pytest.mark.parametrize(("start", "end"), [(9, 10), (7, 9), (8, 33)], ids=["gap", "overlap", "beyond its room"])
def test_a_delta_that_does_not_fit_fails_its_sequence_only(start: int, end: int) -> None:
    rig, slot = _started()
    rig.engine.cache.free(slot)
    assert rig.engine.cache.allocate(48) == slot
    rig.port.send([Delta(1, start, end, slot, complete=False)])
    (failed,) = rig.run(lambda seen: bool(seen))
    assert isinstance(failed, Failed)
    assert f"got a delta [{start}, {end}), wanted [8, …) within 16" in str(failed.error)
    assert rig.mirrors(rig.delta(Prefill(2, _tokens(4), 8)))
    assert rig.call(Release(1)) == [Released(1)]
    rig.close()


def test_a_delta_that_comes_twice_is_dropped() -> None:
    rig, slot = _started()
    rig.port.send([Delta(1, 0, 8, slot), Delta(1, 4, 8, slot)])
    delta = rig.delta(Commit(1, 8, _tokens(3)))
    assert [event for event in rig.events if isinstance(event, Delta)][1:] == [delta]
    assert rig.mirrors(delta)
    rig.close()


def test_a_delta_overtaken_by_its_sequence_fails_instead_of_lying() -> None:
    rig = distributed_rig(dataclasses.replace(QUICK, staging_buffers=1))
    rig.delta(Prefill(1, (), 16))
    first, second = rig.engine.read(1, _tokens(3)), rig.engine.read(1, _tokens(2))
    rig.port.send([first, second])
    seen = rig.run(lambda seen: bool(seen))
    assert isinstance(seen[0], Failed)
    assert "moved on before its delta [0, 3) was sent" in str(seen[0].error)
    rig.close()


def test_released_drops_what_waits_for_a_buffer() -> None:
    rig = distributed_rig(dataclasses.replace(QUICK, staging_buffers=1, staging_bytes=64))
    rig.link.submit([Prefill(n, _tokens(40), 40) for n in (1, 2)])
    rig.tick_until(lambda: len(rig.engine.histories) == 2)
    rig.engine.cache.free(rig.engine.slots.pop(1))
    rig.port.send([Released(1)])
    seen = rig.run(lambda seen: Released(1) in seen and any(e.sequence == 2 and e.complete for e in _deltas(seen)))
    assert len([delta for delta in _deltas(seen) if delta.sequence == 1]) <= 1
    rig.close()


def _deltas(events: Sequence[object]) -> list[Delta]:
    return [event for event in events if isinstance(event, Delta)]


def test_both_engines_are_woken_when_something_came() -> None:
    woken = {"context": threading.Event(), "denoiser": threading.Event()}
    port, address = open_port(new_cache(), 0, 0, QUICK, EngineHooks(on_activity=woken["context"].set))
    link = connect(address, new_cache(), EngineHooks(on_activity=woken["denoiser"].set))
    engine = ScriptedContext(port, new_cache())
    engine.cache = port._cache
    link.submit([Prefill(1, _tokens(3), 8)])
    assert woken["context"].wait(5)
    engine.tick()
    assert woken["denoiser"].wait(5)
    assert len(link.poll()) == 1
    woken["denoiser"].clear()
    port.close()
    assert woken["denoiser"].wait(5)
    link.close()


def test_engines_that_only_work_when_woken_miss_nothing_under_back_pressure() -> None:
    woken = threading.Event()
    settings = dataclasses.replace(QUICK, staging_buffers=1, staging_bytes=64)
    cache, hooks = new_cache(), EngineHooks(on_activity=woken.set)
    port, address = open_port(cache, 0, 0, settings, hooks)
    link = connect(address, new_cache(), hooks)
    engine = ScriptedContext(port, cache, chunk=2)
    link.submit([Prefill(1, _tokens(100), 100)])
    seen = 0
    while seen < 50:
        assert woken.wait(5)
        woken.clear()
        engine.tick()
        seen += len(link.poll())
        link.submit(())
    link.close()
    port.close()


def test_a_taken_payload_is_said_with_the_next_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """One message a tick: what an engine submits carries the buffers that its poll has freed."""
    rig = distributed_rig()
    assert isinstance(rig.link, DistributedLink)
    said: list[list[str]] = []
    post = rig.link._endpoint.post

    def watched(messages: Sequence[Message]) -> None:
        said.append([type(message).__name__ for message in messages])
        post(messages)

    rig.link.submit([Prefill(1, _tokens(5), 16)])
    monkeypatch.setattr(rig.link._endpoint, "post", watched)
    events: list[LinkEvent] = []

    def has_come() -> bool:
        rig.engine.tick()
        events.extend(rig.link.poll())
        return bool(events)

    wait_until(has_come)
    assert said == []
    rig.link.submit([Commit(1, 5, _tokens(4))])
    rig.link.submit(())
    assert said == [["Taken", "Commit"]]
    rig.close()


def test_the_denoiser_side_makes_ready_while_a_payload_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = distributed_rig()
    assert isinstance(rig.link, DistributedLink) and isinstance(rig.port, DistributedPort)
    rig.delta(Prefill(1, _tokens(5), 16))  # the link stands
    announced = threading.Event()
    fetch, pack = rig.link._fetch, rig.port._layout.pack

    def watched_fetch(group: DataGroup, payload: Payload) -> object:
        announced.set()
        return fetch(group, payload)

    def late_pack(deltas: Sequence[Delta], buffer: StagingBuffer) -> None:
        assert announced.wait(5), "nothing was announced before packing"
        pack(deltas, buffer)

    monkeypatch.setattr(rig.link, "_fetch", watched_fetch)
    monkeypatch.setattr(rig.port._layout, "pack", late_pack)
    delta = rig.delta(Commit(1, 5, _tokens(4)))
    assert delta.end == 9 and rig.mirrors(delta)
    rig.close()


def test_replies_sent_before_the_denoiser_connects_wait_for_it() -> None:
    cache = new_cache()
    port, address = open_port(cache, 0, 0, QUICK)
    port.send([Failed(1, Overloaded("nothing yet"))])
    link = connect(pickle.loads(pickle.dumps(address)), new_cache())
    link.submit([Prefill(1, (), 8)])
    rig = Rig(link, port, ScriptedContext(port, cache))
    rig.run(lambda seen: bool(seen))
    rig.close()


@pytest.mark.parametrize(("field", "value"), [("epoch", 2), ("link", 1)])
def test_another_epoch_or_link_is_refused_and_the_right_one_still_let_in(field: str, value: int) -> None:
    port, address = open_port(new_cache(), 0, 3, QUICK)
    stale = dataclasses.replace(address, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(LinkDown, match=f"refused: {field}: got {value}, wanted"):
        connect(stale, new_cache())
    link = connect(address, new_cache())
    assert port.lost is None
    link.close()
    port.close()


def test_a_mirror_of_another_shape_is_refused() -> None:
    port, address = open_port(new_cache(), 0, 0, QUICK)
    with pytest.raises(LinkDown, match="layout: got"):
        connect(address, new_cache(config=dataclasses.replace(CONFIG, head_dim=4)))
    port.close()


def test_whoever_lacks_the_key_is_not_let_in() -> None:
    port, address = open_port(new_cache(), 0, 0, QUICK)
    with pytest.raises(LinkDown, match="could not connect"):
        connect(dataclasses.replace(address, control=dataclasses.replace(address.control, token="guess")), new_cache())
    with socket.create_connection((address.control.host, address.control.port)) as silent:
        silent.sendall(b"GET / HTTP/1.1\r\n\r\n")
        link = connect(address, new_cache())
    link.close()
    port.close()
    assert address.control.token not in repr(address)


def test_a_port_that_nobody_connects_to_is_lost() -> None:
    port, _ = open_port(new_cache(), 4, 1, LinkSettings(setup_timeout_s=0.2))
    wait_until(lambda: port.lost)
    assert port.lost == "link 4 epoch 1: the denoiser side did not connect within 0.2 s"
    port.close()


def test_connecting_to_a_closed_port_fails_at_once() -> None:
    port, address = open_port(new_cache(), 4, 1, QUICK)
    started = time.monotonic()
    port.close()
    with pytest.raises(LinkDown, match="link 4 epoch 1: could not connect"):
        connect(address, new_cache())
    assert time.monotonic() - started < 2


def test_settings_name_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="data_backend: got 'mpi'"):
        LinkSettings(data_backend="mpi")
    with pytest.raises(ConfigError, match="staging_buffers: got 0"):
        LinkSettings(staging_buffers=0)


def test_nccl_is_taken_between_two_gpus_only() -> None:
    assert choose_backend("auto", "cpu", "cpu") == "gloo"
    assert choose_backend("auto", "cuda A", "cuda B") == "nccl"
    assert choose_backend("auto", "cuda A", "cuda A") == "gloo"
    assert choose_backend("gloo", "cuda A", "cuda B") == "gloo"
    for pair in (("cpu", "cpu"), ("cuda A", "cuda A"), ("cuda A", "cpu")):
        with pytest.raises(ConfigError, match="wanted two GPUs"):
            choose_backend("nccl", *pair)


def test_all_sockets_are_on_the_loopback_address() -> None:
    mine = psutil.Process()
    before = {c.laddr for c in mine.net_connections() if c.status == psutil.CONN_LISTEN}
    rig = distributed_rig()
    listening = {c.laddr for c in mine.net_connections() if c.status == psutil.CONN_LISTEN} - before
    assert listening
    assert {address.ip for address in listening} == {"127.0.0.1"}
    rig.close()


def _resources() -> tuple[int, int, int]:
    mine = psutil.Process()
    return mine.num_fds(), threading.active_count(), mine.num_threads()


def _at_most(before: tuple[int, int, int]) -> bool:
    return all(now <= then for now, then in zip(_resources(), before, strict=True))


@pytest.mark.slow
def test_closing_leaves_no_thread_and_no_descriptor() -> None:
    for first_end in ("link", "port"):
        distributed_rig().close()  # what torch keeps for the process's life is there now
        gc.collect()
        before = _resources()
        for _ in range(3):
            rig = distributed_rig()
            rig.mirrors(rig.delta(Prefill(1, _tokens(8), 16)))
            getattr(rig, first_end).close()
            rig.close()
        del rig
        gc.collect()
        wait_until(partial(_at_most, before))


def test_a_mirror_slot_of_a_lost_link_is_free_again() -> None:
    mirror = new_cache()
    rig = distributed_rig(mirror=mirror)
    rig.delta(Prefill(1, _tokens(8), 16))
    rig.port.close()
    rig.run(lambda seen: bool(seen))
    assert mirror.room.free_slots == 8
    rig.close()


def test_what_comes_after_the_end_is_not_written() -> None:
    """The slots are given back by then, and may be another link's on the same mirror."""
    rig = distributed_rig()
    link = rig.link
    assert isinstance(link, DistributedLink)
    slot = rig.delta(Prefill(1, _tokens(3), 64)).slot
    buffer = link._pool.take()
    assert buffer is not None
    buffer.grow(1 << 16)
    for ended in (False, True):
        arrived = link._sift([Delta(1, 3, 8, 0)] if not ended else [Delta(1, 8, 12, 0)], buffer)
        buffer.flat.fill_(1)
        before = [tensor.clone() for tensor in (link.cache.conv, link.cache.ssm, link.cache.keys)]
        if ended:
            link._end()
        with torch.inference_mode(), link._unpacking(arrived):
            pass
        assert arrived.written != ended
        after = (link.cache.conv, link.cache.ssm, link.cache.keys)
        assert all(torch.equal(then, now) for then, now in zip(before, after, strict=True)) == ended
    assert slot in link.cache.room._free_slots
    rig.close()
