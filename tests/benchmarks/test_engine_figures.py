"""The arithmetic of the engine benchmark: sets of time, ceilings, shares, percentiles."""

import pytest

from benchmarks.engine_parts.ceiling import (
    Costs,
    Demand,
    PassCosts,
    ar_ceiling,
    diffusion_ceiling,
    simple_ratio,
    turns_ceiling,
)
from benchmarks.engine_parts.intervals import difference, intersection, total, union
from benchmarks.engine_parts.load import Answer, Run
from benchmarks.engine_parts.profile import summarise
from benchmarks.engine_parts.recorder import EXCHANGE, FORWARD, Crossing, Recording, Span, Tick
from benchmarks.engine_parts.shares import crossings_ms, overlap, percentile, step_gaps, tick_parts
from twotower.core import BlockEvent, Request, RequestId


def test_sets_of_time() -> None:
    some = union([(3.0, 4.0), (0.0, 1.0), (0.5, 2.0), (5.0, 5.0)])
    assert some == [(0.0, 2.0), (3.0, 4.0)]
    assert intersection(some, [(1.0, 3.5)]) == [(1.0, 2.0), (3.0, 3.5)]
    assert difference([(0.0, 5.0)], some) == [(2.0, 3.0), (4.0, 5.0)]
    assert difference(some, []) == some
    assert difference([(1.0, 2.0)], [(0.0, 9.0)]) == []
    assert difference([], some) == []
    assert total(some) == 3.0


def _costs(denoise: float, commit: float, ar: float, prompt: float = 0.0, growth: float = 1.0) -> PassCosts:
    def of(seconds: float) -> Costs:
        return Costs({1: seconds, 4: seconds * growth})

    return PassCosts(of(denoise), of(commit), of(ar), of(prompt))


def test_costs_between_measured_rows_lie_on_a_line() -> None:
    costs = Costs({1: 1.0, 4: 4.0, 16: 10.0})
    assert [costs(rows) for rows in (1, 2, 4, 10, 16)] == [1.0, 2.0, 4.0, 7.0, 10.0]


def test_the_towers_take_turns_at_concurrency_one() -> None:
    ceiling = diffusion_ceiling(_costs(2.0, 3.0, 1.0, prompt=5.0), Demand(128, 20, 7), 1)
    assert ceiling.tokens_per_s == pytest.approx(128 / (20 * 2 + 7 * 3 + 5))
    assert ceiling.bound == "towers in turn"


def test_the_busier_tower_bounds_when_there_is_enough_to_do() -> None:
    demand = Demand(128, 20, 7)
    crowd = diffusion_ceiling(_costs(2.0, 3.0, 1.0, growth=1.0), demand, 4)
    # A pass costs the same however many rows: all but the 4·21/61 rows being committed would step at once.
    assert crowd.bound in ("denoiser tower", "rows")
    assert crowd.tokens_per_s == pytest.approx(128 * 4 / (20 * 2 + 7 * 3))
    linear = diffusion_ceiling(_costs(2.0, 3.0, 1.0, growth=4.0), demand, 4)
    assert linear.bound == "denoiser tower"
    assert linear.tokens_per_s == pytest.approx(128 / (20 * 2))
    commits = diffusion_ceiling(_costs(1.0, 9.0, 1.0, growth=4.0), demand, 4)
    assert commits.bound == "context tower"
    assert commits.tokens_per_s == pytest.approx(128 / (7 * 9))


def test_ar_ceiling_counts_the_prompt_as_the_first_token() -> None:
    assert ar_ceiling(_costs(0, 0, 1.0, prompt=3.0), 11, 4).tokens_per_s == pytest.approx(44 / 13)


def test_passes_after_a_pause_have_their_own_price() -> None:
    costs, rested = _costs(2.0, 3.0, 1.0, prompt=5.0), _costs(2.5, 4.0, 1.0)
    assert turns_ceiling(costs, rested, Demand(128, 20, 7)) == pytest.approx(128 / (12 * 2 + 8 * 2.5 + 7 * 4 + 5))


def test_the_simple_ratio() -> None:
    assert simple_ratio(_costs(2.0, 2.0, 1.0), 4.0) == pytest.approx(16 / (2 * (16 / 4 + 1)))


def _span(name: str, start: float, end: float, slots: tuple[int, ...] = (), width: int = 16) -> Span:
    return Span(name, start, end, end - start, slots, width)


def _tick(start: float, end: float, worked: bool = True, active: int = 2, rows: int = 1) -> Tick:
    return Tick(start, end, (end - start) / 2, worked, active, rows)


def test_parts_of_a_tick_add_up() -> None:
    spans = [_span(FORWARD, 0.0, 6.0), _span(EXCHANGE, 6.0, 7.0), _span(EXCHANGE, 20.0, 21.0)]
    parts = tick_parts(Recording([_tick(0.0, 10.0, rows=3), _tick(20.0, 22.0, worked=False)], spans))
    assert parts is not None
    assert (parts.forward, parts.exchange, parts.decision) == pytest.approx((0.6, 0.1, 0.0))
    assert (parts.rest, parts.outside_forward, parts.cpu, parts.rows) == pytest.approx((0.3, 0.4, 0.5, 3.0))
    assert tick_parts(Recording()) is None


def test_overlap_tells_exchange_from_other_work() -> None:
    """Ten seconds: computing until 6, by one tower or both; then 1 s of packing, 2 s on the way, 1 s of our own."""
    denoiser = Recording(
        [_tick(0.0, 4.0), _tick(9.0, 10.0, rows=3), _tick(10.0, 10.5, worked=False, active=0), _tick(11.0, 11.5)],
        [_span(FORWARD, 0.0, 4.0)],
    )
    context = Recording([_tick(3.0, 7.0)], [_span(FORWARD, 3.0, 6.0), _span(EXCHANGE, 6.0, 7.0)])
    seen = overlap({"denoiser": denoiser, "context": context}, 2)
    assert seen is not None
    assert seen.seconds == pytest.approx(10.0)
    assert (seen.denoiser, seen.context) == pytest.approx((0.5, 0.4))
    assert (seen.neither, seen.exchange, seen.on_the_way) == pytest.approx((0.4, 0.3, 0.2))
    assert overlap({"denoiser": denoiser, "context": context}, 3) is None


def test_a_commit_is_followed_through_both_processes() -> None:
    denoiser = Recording(crossings=[Crossing("submitted", 1, 9, 0.0), Crossing("polled", 1, 9, 0.010)])
    context = Recording(crossings=[Crossing("received", 1, 9, 0.001), Crossing("sent", 1, 9, 0.004)])
    denoiser.crossings.append(Crossing("submitted", 1, 25, 0.02))  # its delta never came
    stages = crossings_ms({"denoiser": denoiser, "context": context})
    assert [ms[0] for ms in stages.values()] == pytest.approx([1.0, 3.0, 6.0])


def test_steps_of_a_slot_are_paired_and_chunks_are_no_steps() -> None:
    forwards = [_span(FORWARD, 0, 1, (1, 2)), _span(FORWARD, 2, 5, (3,), 512), _span(FORWARD, 5, 6, (1,))]
    assert step_gaps(Recording(spans=[*forwards, _span(FORWARD, 9, 10, (1, 2))]), 1.0, 8.0, 16) == [5]


def test_percentiles() -> None:
    assert [percentile([3.0, 1.0, 2.0], p) for p in (0, 50, 75, 100)] == [1.0, 2.0, 2.5, 3.0]
    assert percentile([7.0], 99) == 7.0


def _answer(*arrivals: float) -> Answer:
    events = [BlockEvent(RequestId("r"), i, (1, 2), 4, 1) for i in range(len(arrivals))]
    return Answer(Request(RequestId("r"), (1,)), 0.0, events, list(arrivals))


def test_what_clients_see() -> None:
    answer = _answer(1.0, 3.0, 7.0)
    assert answer.gaps_per_step() == [0.5, 1.0]
    run = Run((answer, _answer(2.0, 4.0, 6.0)), 0.0, 8.0, (2.0, 7.0))
    assert run.tokens_per_s == 12 / 8
    assert run.steady_tokens_per_s == pytest.approx(8 / 5)  # what came after 2 and until 7
    assert run.mean_steps == 12


def test_samples_are_counted_by_our_innermost_function() -> None:
    thread = "_bootstrap (threading.py:1);_run (/x/twotower/engine/runner.py:9)"
    stacks = (
        f"{thread};tick (/x/twotower/engine/e.py:1);run (torch/nn.py:3) 30\n{thread} 10\nserve (/x/actors/line.py:2) 5"
    )
    taken = summarise(stacks)
    assert taken.samples == 40
    assert dict(taken.ours) == {"twotower/engine/e.py tick": 0.75, "twotower/engine/runner.py _run": 0.25}
