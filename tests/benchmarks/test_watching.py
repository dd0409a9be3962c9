"""The benchmark of watching: its ratios are by the round, its ways leave out what they say, its report has both."""

from contextlib import closing
from http.client import HTTPConnection

import pytest

from benchmarks.watching import render, render_alone
from benchmarks.watching_parts.figures import MEASURES, Found, Slice, Way, lost, surely
from benchmarks.watching_parts.observers import OBSERVERS, chosen, costs_us
from benchmarks.watching_parts.sink import sink
from cluster.runs.observers import Observer
from cluster.watch.run_traces import RunTraces
from twotower.core import Mode

TOKENS_A_SECOND, SERVICE_CPU = MEASURES[0], MEASURES[4]


def found(*seconds_by_round: tuple[float, float, float]) -> Found:
    """Of 10 requests of 10 tokens a slice; the service takes as much CPU time as the slice does."""
    made = Found()
    for times in seconds_by_round:
        for way, seconds in zip(Way, times, strict=True):
            made.add("ar", way, Slice(10, 100, seconds, (0.1, 0.2, 0.3), seconds / 10, seconds))
    return made


def test_ratios_are_to_the_unwatched_slice_of_the_same_round() -> None:
    one = found((1.0, 1.25, 2.0), (4.0, 5.0, 4.0), (2.0, 1.0, 4.0))
    assert one.values("ar", Way.OFF, TOKENS_A_SECOND) == [100.0, 25.0, 50.0]
    assert one.ratios("ar", Way.DEFAULT, TOKENS_A_SECOND) == [0.8, 0.8, 2.0]
    assert one.ratios("ar", Way.TRACES, SERVICE_CPU) == [2.0, 1.0, 2.0]
    assert lost([0.8, 0.8, 2.0]) == pytest.approx(0.2)


def test_how_sure_a_median_is() -> None:
    assert surely([3.0, 1.0, 2.0]) == (1.0, 3.0), "of few rounds all there are"
    assert surely([float(value) for value in range(9)]) == (1.0, 7.0)
    assert surely([float(value) for value in range(12)]) == (2.0, 9.0)


def test_the_report_says_what_is_gone_and_which_observer_takes_what() -> None:
    report = render(
        found((1.0, 1.0, 1.25), (1.0, 1.01, 1.25)), {("traces", Mode.AR): [1000.0, 2000.0, 3000.0]}, "- here"
    )
    assert "`ar`, default: 0.5 % of the throughput is gone, between 0.0 and 1.0 % (within the aim of 2 %)" in report
    assert (
        "`ar`, with traces: 20.0 % of the throughput is gone, between 20.0 and 20.0 % (MORE than the aim of 2 %)"
        in report
    )
    assert "| ar | traces | 2000 (1000–3000) | 2.00 % |" in report, "of 100 ms"


def test_without_a_service_observers_are_a_share_of_what_engines_spend() -> None:
    costs = {("log line", Mode.AR): [50.0], ("metrics", Mode.AR): [100.0], ("traces", Mode.AR): [400.0]}
    report = render_alone(costs, {Mode.AR: [20.0, 10.0, 30.0]}, "- here")
    assert "| ar | 20.0 (10.0–30.0) |" in report and "| ar | traces | 400 (400–400) | 2.00 % |" in report
    assert "| ar | all but traces | 150 | 0.75 % |" in report and "throughput was not measured" in report


def test_every_observer_is_timed_and_what_traces_cost_is_more_than_nothing() -> None:
    costs = {name: costs_us(name, Mode.DIFFUSION, 64, 16) for name in OBSERVERS}
    assert costs.keys() == {"log line", "metrics", "ops page", "traces"} and costs["traces"] > 0


def test_ways_of_watching() -> None:
    plain, traces = Observer(), RunTraces.__new__(RunTraces)
    assert chosen((plain, traces), Way.OFF) == ()
    assert chosen((plain, traces), Way.DEFAULT) == (plain,)
    assert chosen((plain, traces), Way.TRACES) == (plain, traces)
    with pytest.raises(RuntimeError, match="makes no traces"):
        chosen((plain,), Way.DEFAULT)


def test_the_collector_counts_what_comes() -> None:
    with sink() as traces, closing(HTTPConnection("127.0.0.1", traces.port, timeout=10)) as http:
        assert traces.received() == (0, 0)
        http.request("POST", "/v1/traces", b"spans")
        assert http.getresponse().status == 200
        assert traces.received() == (1, 5)
