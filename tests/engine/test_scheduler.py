"""What the context engine does next, with scripted sequences and no tower."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.engine.scheduler import (
    CommitBatch,
    ContextScheduler,
    DecodeBatch,
    PrefillBatch,
    PrefillChunk,
    Work,
)


def _next(scheduler: ContextScheduler) -> Work | None:
    """The next work, done at once."""
    work = scheduler.next()
    if isinstance(work, PrefillBatch):
        scheduler.has_read()
    return work


def test_chunks_that_are_read_in_parts_come_again_until_they_are_done() -> None:
    scheduler = ContextScheduler(16)
    scheduler.add_decoding("a")
    for key in ("p", "q"):
        scheduler.add_prompt(key, 0, 16)
    steps, first, second = DecodeBatch(("a",)), *(PrefillBatch((PrefillChunk(key, 0, 16),)) for key in "pq")
    assert [scheduler.next() for _ in range(4)] == [steps, first, steps, first]
    scheduler.has_read()
    assert [scheduler.next() for _ in range(4)] == [steps, second, steps, second]
    scheduler.has_read()
    assert [scheduler.next() for _ in range(2)] == [steps, steps]


def _kinds(scheduler: ContextScheduler, count: int) -> list[str]:
    return [type(_next(scheduler)).__name__ for _ in range(count)]


def test_nothing_to_do() -> None:
    assert _next(ContextScheduler(16)) is None


def test_commits_first_then_each_kind_once() -> None:
    scheduler = ContextScheduler(16)
    scheduler.add_prompt("p", 0, 100)
    scheduler.add_decoding("a")
    scheduler.add_commit("c", 16)
    scheduler.add_commit("d", 4)
    assert _next(scheduler) == CommitBatch(("c", "d"))
    assert _next(scheduler) == DecodeBatch(("a",))
    assert _next(scheduler) == PrefillBatch((PrefillChunk("p", 0, 16),))
    assert _next(scheduler) == DecodeBatch(("a",))
    assert _next(scheduler) == PrefillBatch((PrefillChunk("p", 16, 32),))


def test_a_commit_that_arrives_waits_at_most_for_the_rest_of_the_cycle() -> None:
    scheduler = ContextScheduler(16)
    scheduler.add_prompt("p", 0, 1000)
    scheduler.add_decoding("a")
    assert _kinds(scheduler, 1) == ["DecodeBatch"]
    scheduler.add_commit("c", 16)
    assert _kinds(scheduler, 3) == ["CommitBatch", "PrefillBatch", "DecodeBatch"]


def test_a_stream_of_commits_starves_nobody() -> None:
    scheduler = ContextScheduler(16)
    scheduler.add_prompt("p", 0, 10_000)
    scheduler.add_decoding("a")
    done: list[str] = []
    for number in range(60):
        scheduler.add_commit(number, 16)
        done += _kinds(scheduler, 1)
    assert Counter(done) == {"CommitBatch": 20, "DecodeBatch": 20, "PrefillBatch": 20}
    assert all(done[i] != done[i + 1] for i in range(59))


def test_a_wide_block_does_not_make_everybody_wide() -> None:
    """Sixteen rows of 16 share a forward beyond the chunk; with one of 1,024 it would be 17,408 positions."""
    scheduler = ContextScheduler(128)
    for number in range(8):
        scheduler.add_commit(number, 16)
    scheduler.add_commit("wide", 1024)
    scheduler.add_commit("half", 64)
    for number in range(8, 16):
        scheduler.add_commit(number, 1)
    assert _next(scheduler) == CommitBatch(tuple(range(16)))
    assert _next(scheduler) == CommitBatch(("wide",))
    scheduler.add_commit("other half", 33)
    scheduler.add_commit("third", 33)
    assert _next(scheduler) == CommitBatch(("half", "other half"))
    assert _next(scheduler) == CommitBatch(("third",))
    assert _next(scheduler) is None


def _waited_for(*keys: str) -> ContextScheduler:
    """With these blocks to read, for which everybody waits."""
    scheduler = ContextScheduler(128, waited_for=lambda _: True)
    for key in keys:
        scheduler.add_commit(key, 16)
    return scheduler


def test_blocks_that_all_wait_for_are_read_in_two_halves() -> None:
    for keys, first, second in (("abcd", "ab", "cd"), ("abc", "ab", "c"), ("ab", "a", "b")):
        scheduler = _waited_for(*keys)
        assert [_next(scheduler), _next(scheduler)] == [CommitBatch(tuple(first)), CommitBatch(tuple(second))]
        assert _next(scheduler) is None
    assert _next(_waited_for("a")) == CommitBatch(("a",))
    scheduler = ContextScheduler(128, waited_for=lambda keys: "d" in keys)
    for key in "abc":
        scheduler.add_commit(key, 16)
    assert _next(scheduler) == CommitBatch(tuple("abc"))


def test_the_second_half_is_not_halved_again() -> None:
    """However fast the first rows come back: they and those that were left are one batch, in their order."""
    scheduler, read = _waited_for(*"abcd"), []
    for _ in range(6):
        work = _next(scheduler)
        assert isinstance(work, CommitBatch)
        read.append("".join(map(str, work.keys)))
        for key in work.keys:
            scheduler.add_commit(key, 16)
    assert read == ["ab", "cdab", "cd", "abcd", "ab", "cdab"]


def test_where_something_else_is_to_be_read_nothing_is_halved() -> None:
    """The other half would wait for it, too."""
    for add in (
        lambda scheduler: scheduler.add_prompt("p", 0, 300),
        lambda scheduler: scheduler.add_decoding("x"),
        lambda scheduler: scheduler.add_commit("wide", 1024),
    ):
        scheduler = _waited_for(*"abcd")
        add(scheduler)
        assert _next(scheduler) == CommitBatch(tuple("abcd"))
    scheduler = ContextScheduler(128, waited_for=lambda _: True)
    scheduler.add_prompt("p", 0, 100)
    scheduler.next()  # the front part of all of it
    for key in "ab":
        scheduler.add_commit(key, 16)
    assert scheduler.next() == CommitBatch(tuple("ab"))


def test_what_comes_between_the_halves_waits_for_both() -> None:
    """As it would have for the whole."""
    scheduler = _waited_for(*"abcd")
    assert _next(scheduler) == CommitBatch(tuple("ab"))
    scheduler.add_prompt("p", 0, 100)
    scheduler.add_decoding("x")
    assert _next(scheduler) == CommitBatch(tuple("cd"))
    for key in "ab":
        scheduler.add_commit(key, 16)
    assert _kinds(scheduler, 3) == ["DecodeBatch", "PrefillBatch", "CommitBatch"]


def test_what_is_dropped_between_the_halves_is_not_read() -> None:
    scheduler = _waited_for(*"abcd")
    assert _next(scheduler) == CommitBatch(tuple("ab"))
    scheduler.drop("c")
    assert _next(scheduler) == CommitBatch(("d",))
    assert _next(scheduler) is None


def test_the_first_prompt_and_the_shortest_lead_in_turn() -> None:
    scheduler = ContextScheduler(16)
    scheduler.add_prompt("first", 0, 40)
    scheduler.add_prompt("second", 0, 20)
    chunks = [_chunks(_next(scheduler)) for _ in range(4)]
    assert chunks == [
        [PrefillChunk("first", 0, 16)],
        [PrefillChunk("second", 0, 16)],
        [PrefillChunk("first", 16, 32)],
        [PrefillChunk("second", 16, 20), PrefillChunk("first", 32, 40)],
    ]


def test_a_prompt_that_a_short_one_waits_for_leads_as_the_short_one_would() -> None:
    scheduler = ContextScheduler(16)
    for key, length in (("first", 160), ("long", 320), ("short", 64)):
        scheduler.add_prompt(key, 0, length)
    scheduler.await_prompts({"long": 40, "gone": 1})
    assert [_prefill_key(scheduler) for _ in range(4)] == ["first", "long", "first", "long"]
    scheduler.await_prompts({})
    assert {_prefill_key(scheduler) for _ in range(2)} == {"first", "short"}


def _prefill_key(scheduler: ContextScheduler) -> object:
    work = _next(scheduler)
    assert isinstance(work, PrefillBatch)
    return work.chunks[0].key


def test_prompts_of_one_length_are_read_in_the_order_they_came() -> None:
    """One that is read can be decoded while the others are."""
    scheduler = ContextScheduler(16)
    for key in "abc":
        scheduler.add_prompt(key, 0, 64)
    assert "".join(str(_chunks(_next(scheduler))[0].key) for _ in range(12)) == "aaaabbbbcccc"


def test_a_short_prompt_does_not_wait_for_the_long_ones_before_it() -> None:
    scheduler = ContextScheduler(512)
    for key in range(8):
        scheduler.add_prompt(key, 0, 4000)
    for waited in range(3):
        scheduler.add_prompt("short", 0, 9)
        batches = [_chunks(_next(scheduler)) for _ in range(2)]
        assert PrefillChunk("short", 0, 9) in [chunk for batch in batches for chunk in batch], waited


def test_a_long_prompt_goes_on_under_a_stream_of_short_ones() -> None:
    scheduler = ContextScheduler(512)
    scheduler.add_prompt("long", 0, 4000)
    read = 0
    for number in range(16):
        scheduler.add_prompt(number, 0, 9)
        read += sum(chunk.key == "long" for chunk in _chunks(_next(scheduler)))
    assert read == 8


def test_long_prompts_hold_up_steps_and_commits_by_one_batch() -> None:
    scheduler = ContextScheduler(512)
    for key in range(4):
        scheduler.add_prompt(key, 0, 4000)
    scheduler.add_decoding("a")
    for number in range(20):
        scheduler.add_commit(number, 16)
        assert _kinds(scheduler, 3) == ["CommitBatch", "DecodeBatch", "PrefillBatch"]


@settings(deadline=None, derandomize=True)
@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 200)), min_size=1, max_size=20),
)
def test_no_prompt_starves(chunk: int, arrivals: list[tuple[int, int]]) -> None:
    """Whatever comes before it and after it: twice as many batches as chunks were left to read, its own included."""
    scheduler = ContextScheduler(chunk)
    left: dict[int, int] = {}
    latest: dict[int, int] = {}
    batches = 0
    pending = list(enumerate(arrivals))
    while pending or left:
        if pending and (not left or pending[0][1][0] == 0):
            key, (_, length) = pending.pop(0)
            scheduler.add_prompt(key, 0, length)
            left[key] = -(-length // chunk)
            latest[key] = batches + 2 * sum(left.values())
            continue
        pending[:1] = [(key, (pause - 1, length)) for key, (pause, length) in pending[:1]]
        batches += 1
        for read in _chunks(_next(scheduler)):
            key = int(str(read.key))
            left[key] -= 1
            if not left[key]:
                del left[key]
                assert batches <= latest[key], key


def _chunks(work: Work | None) -> list[PrefillChunk]:
    assert isinstance(work, PrefillBatch)
    return list(work.chunks)


def test_short_prompts_share_a_forward() -> None:
    scheduler = ContextScheduler(16)
    for key, length in [("a", 5), ("b", 4), ("c", 5), ("d", 2)]:
        scheduler.add_prompt(key, 0, length)
    assert [chunk.key for chunk in _chunks(_next(scheduler))] == ["a", "b", "c"]
    assert [chunk.key for chunk in _chunks(_next(scheduler))] == ["d"]
    assert _next(scheduler) is None


@settings(deadline=None, derandomize=True)
@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 90)), min_size=1, max_size=8),
    st.integers(0, 5),
)
def test_chunk_boundaries_are_absolute(chunk: int, prompts: list[tuple[int, int]], commits: int) -> None:
    """Wherever reading starts and whatever else is going on: multiples of the chunk size, nothing left out."""
    scheduler = ContextScheduler(chunk)
    for key, (done, more) in enumerate(prompts):
        scheduler.add_prompt(key, done, done + more)
    read = {key: done for key, (done, _) in enumerate(prompts)}
    for turn in range(1000):
        if turn < commits:
            scheduler.add_commit(f"c{turn}", 3)
        work = _next(scheduler)
        if work is None:
            break
        if not isinstance(work, PrefillBatch):
            continue
        widest = max(c.end - c.start for c in work.chunks)
        assert len(work.chunks) == 1 or widest * len(work.chunks) <= chunk
        for c in work.chunks:
            assert c.start == read[c.key]  # type: ignore[index]
            assert c.end == sum(prompts[c.key]) or c.end % chunk == 0  # type: ignore[index]
            assert c.start // chunk == (c.end - 1) // chunk, "a chunk crosses a boundary"
            read[c.key] = c.end  # type: ignore[index]
    assert read == {key: done + more for key, (done, more) in enumerate(prompts)}


@pytest.mark.parametrize("key", ["commit", "decode", "prompt"])
def test_dropped_sequences_are_never_picked(key: str) -> None:
    scheduler = ContextScheduler(16)
    scheduler.add_commit("commit", 16)
    scheduler.add_decoding("decode")
    scheduler.add_prompt("prompt", 0, 5)
    scheduler.drop(key)
    scheduler.drop("unknown")
    works = [_next(scheduler), _next(scheduler)]
    picked = {k for work in works for k in (getattr(work, "keys", None) or [c.key for c in _chunks(work)])}
    assert picked == {"commit", "decode", "prompt"} - {key}


def test_a_decoding_sequence_goes_on_until_dropped() -> None:
    scheduler = ContextScheduler(16)
    scheduler.add_decoding("a")
    scheduler.add_decoding("b")
    scheduler.add_decoding("a")
    assert [_next(scheduler) for _ in range(3)] == [DecodeBatch(("a", "b"))] * 3
    scheduler.drop("a")
    assert _next(scheduler) == DecodeBatch(("b",))
