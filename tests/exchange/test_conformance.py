"""What every exchange promises, whoever carries it: in place, between processes, or over a channel that misbehaves."""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.exchange.rig import KINDS, QUICK, Rig, losses, rig_of
from tests.exchange.scripted import state_after
from twotower.errors import FieldError, InvalidRequest, NumericalError, Overloaded, TwoTowerError
from twotower.exchange.protocol import Commit, Delta, Failed, LinkEvent, LinkLost, Prefill, Release, Released, Traffic
from twotower.exchange.settings import LinkSettings

MakeRig = Callable[..., Rig]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture
def make_rig(kind: str) -> Iterator[MakeRig]:
    made: list[Rig] = []

    def make(slots: int = 8, pages: int = 64, settings: LinkSettings = QUICK) -> Rig:
        made.append(rig_of(kind, slots, pages, settings))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    return make_rig()


def _tokens(count: int, offset: int = 4) -> tuple[int, ...]:
    return tuple(range(offset, offset + count))


def test_prefill_and_commits_arrive_bit_for_bit(rig: Rig) -> None:
    delta = rig.delta(Prefill(1, _tokens(5), 40))
    assert (delta.start, delta.end) == (0, 5)
    assert rig.mirrors(delta)
    for start, size in ((5, 16), (21, 1), (22, 7)):
        delta = rig.delta(Commit(1, start, _tokens(size)))
        assert (delta.start, delta.end) == (start, start + size)
        assert rig.mirrors(delta)


def test_an_empty_prefill_is_answered_with_a_zero_state(rig: Rig) -> None:
    delta = rig.delta(Prefill(1, (), 8))
    assert (delta.start, delta.end, delta.complete) == (0, 0, True)
    assert rig.mirrors(delta)
    assert rig.mirrors(rig.delta(Commit(1, 0, (7,))))


def test_a_prompt_comes_in_chunks_and_the_mamba_states_with_the_last(rig: Rig, kind: str) -> None:
    rig.link.submit([Prefill(1, _tokens(40), 40)])
    seen = rig.run(lambda seen: len(seen) == 3)
    deltas = [event for event in seen if isinstance(event, Delta)]
    assert [(d.start, d.end, d.complete) for d in deltas] == [(0, 16, False), (16, 32, False), (32, 40, True)]
    assert rig.mirrors(deltas[-1])


def test_what_crosses_is_counted(rig: Rig, kind: str) -> None:
    """In place nothing does."""
    seen = [replace(rig.link.traffic)]
    rig.delta(Prefill(1, _tokens(5), 40))
    seen.append(replace(rig.link.traffic))
    for start in (5, 21):
        rig.delta(Commit(1, start, _tokens(16)))
        seen.append(replace(rig.link.traffic))
    nbytes = [now.nbytes for now in seen]
    if kind == "local":
        assert seen == [Traffic()] * 4
        return
    assert [now.payloads for now in seen] == [0, 1, 2, 3]
    assert 0 == nbytes[0] < nbytes[1] < nbytes[2] and nbytes[3] - nbytes[2] == nbytes[2] - nbytes[1]
    assert seen[3].seconds > seen[2].seconds > seen[1].seconds > 0


def test_many_sequences_of_all_lengths_keep_their_order(rig: Rig) -> None:
    choose = random.Random(0)
    lengths = {n: 0 for n in range(1, 7)}
    rig.link.submit([Prefill(n, _tokens(n * 3), 90) for n in lengths])
    pending = set(lengths)
    for _ in range(8):
        seen = rig.run(partial(_completed, wanted=pending))
        for event in seen:
            assert isinstance(event, Delta)
            assert event.start == lengths[event.sequence]
            lengths[event.sequence] = event.end
        pending = {n for n in lengths if choose.random() < 0.7}
        rig.link.submit([Commit(n, lengths[n], _tokens(choose.randint(1, 8))) for n in sorted(pending)])
    rig.run(partial(_completed, wanted=pending))
    newest = {event.sequence: event for event in rig.events if isinstance(event, Delta)}
    assert all(rig.mirrors(delta) for delta in newest.values())


def _completed(events: list[LinkEvent], wanted: set[int]) -> bool:
    return {event.sequence for event in events if isinstance(event, Delta) and event.complete} >= wanted


def test_a_released_slot_serves_the_next_sequence(make_rig: MakeRig) -> None:
    rig = make_rig(slots=1, pages=3)
    free = rig.link.cache.room.free_slots, rig.link.cache.room.free_pages
    for sequence in range(1, 6):
        assert rig.mirrors(rig.delta(Prefill(sequence, _tokens(sequence * 7), 40)))
        assert rig.call(Release(sequence)) == [Released(sequence)]
    assert (rig.link.cache.room.free_slots, rig.link.cache.room.free_pages) == free
    assert rig.engine.cache.room.free_slots == 1


def test_nothing_comes_for_a_sequence_after_its_released(make_rig: MakeRig) -> None:
    rig = make_rig(slots=1, pages=3)
    for sequence in range(1, 20):
        rig.link.submit([Prefill(sequence, _tokens(20), 40)])
        if sequence % 2:
            rig.engine.tick()
            time.sleep(0.003)
        rig.link.submit([Release(sequence)])
        rig.run(lambda seen, n=sequence: Released(n) in seen)  # type: ignore[misc]
    gone: set[int] = set()
    for event in rig.events:
        assert isinstance(event, Delta | Released)
        assert event.sequence not in gone
        if isinstance(event, Released):
            gone.add(event.sequence)
    assert rig.mirrors(rig.delta(Prefill(99, _tokens(3), 8)))


def test_errors_cross_with_their_type_and_message(rig: Rig) -> None:
    errors: list[TwoTowerError] = [
        NumericalError("a NaN in layer 3"),
        InvalidRequest([FieldError("start", "got 3, wanted 5"), FieldError("tokens", "got none")]),
    ]
    for sequence, sent in enumerate(errors):
        rig.delta(Prefill(sequence, (), 8))
        rig.engine.failures[sequence] = sent
        (failed,) = rig.call(Commit(sequence, 0, (4,)))
        assert isinstance(failed, Failed)
        assert type(failed.error) is type(sent)
        assert str(failed.error) == str(sent)
        assert rig.call(Release(sequence)) == [Released(sequence)]


def test_a_full_context_cache_fails_the_sequence_not_the_link(make_rig: MakeRig) -> None:
    rig = make_rig(slots=1, pages=4)
    rig.delta(Prefill(1, _tokens(3), 16))
    (failed,) = rig.call(Prefill(2, _tokens(3), 16))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, Overloaded)
    assert rig.call(Release(2)) == [Released(2)]
    assert rig.mirrors(rig.delta(Commit(1, 3, _tokens(2))))


@pytest.mark.slow
def test_back_pressure_holds_replies_back_and_never_the_engine(make_rig: MakeRig) -> None:
    rig = make_rig(slots=4, pages=400, settings=LinkSettings(staging_buffers=1, staging_bytes=2048))
    rig.engine.chunk = 10
    rig.link.submit([Prefill(n, _tokens(250), 250) for n in range(1, 5)])
    seconds = []
    for _ in range(50):  # nobody takes the deltas, and the context engine goes on
        rig.engine.tick()
        started = time.monotonic()
        rig.port.send([])
        seconds.append(time.monotonic() - started)
        time.sleep(0.002)
    assert max(seconds) < 0.5
    seen = rig.run(lambda seen: len(seen) == 100, timeout_s=20)
    deltas = [event for event in seen if isinstance(event, Delta)]
    assert len(deltas) == 100
    assert all(rig.mirrors(delta) for delta in deltas if delta.complete)


def test_submit_never_blocks_while_the_context_engine_sleeps(rig: Rig) -> None:
    started = time.monotonic()
    rig.link.submit([Prefill(1, (), 4)])
    for _ in range(500):
        rig.link.submit([Commit(1, 0, _tokens(64))])
        rig.link.poll()
    assert time.monotonic() - started < 2


def test_the_link_says_once_that_the_context_side_closed(rig: Rig) -> None:
    rig.delta(Prefill(1, _tokens(5), 16))
    rig.port.close()
    assert rig.port.lost is not None
    assert len(losses(rig.run(lambda seen: bool(losses(seen))))) == 1
    assert rig.link.poll() == []
    rig.link.submit([Release(1)])
    assert rig.link.poll() == []


def test_the_port_is_lost_when_the_denoiser_side_closed(rig: Rig) -> None:
    rig.delta(Prefill(1, _tokens(5), 16))
    rig.link.close()
    deadline = time.monotonic() + 5
    while rig.port.lost is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    rig.port.send([Released(1)])
    rig.link.submit([Prefill(2, _tokens(5), 16)])
    assert losses(rig.link.poll()) == []


def test_closing_twice_is_allowed(rig: Rig) -> None:
    rig.close()
    rig.close()
    assert not any(isinstance(event, LinkLost) and "Error" in event.reason for event in rig.link.poll())


def test_an_engine_in_inference_mode_may_use_it(make_rig: MakeRig) -> None:
    rig = make_rig(settings=LinkSettings(staging_bytes=16))
    with torch.inference_mode():
        assert rig.mirrors(rig.delta(Prefill(1, _tokens(5), 40)))
        assert rig.mirrors(rig.delta(Commit(1, 5, _tokens(9))))


def test_the_scripted_states_differ_between_sequences_and_lengths(rig: Rig) -> None:
    """The suite compares something: equal states would hide a mix-up."""
    states = [state_after(rig.link.cache, n, length)[3] for n, length in ((1, 4), (1, 5), (2, 4))]
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
