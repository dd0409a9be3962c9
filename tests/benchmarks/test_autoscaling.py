"""The load that the autoscaling benchmark makes, against a scripted service, and what its report makes of it."""

import asyncio
from pathlib import Path

import pytest

from benchmarks.autoscaling import main
from benchmarks.autoscaling_parts.load import ANSWERED, REFUSED, Asked, Load, quantile
from benchmarks.autoscaling_parts.report import Overload, Wave, overload_text, plot, wave_text
from cluster.runs.admission import Admission
from cluster.runs.generation import Generation
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, grpc_server, served_model
from twotower.core import AnyRequest
from twotower.errors import Unavailable
from twotower_client.asking import Params


async def test_every_request_is_answered_refused_with_a_hint_or_cut() -> None:
    cells = ScriptedCells()
    cells.pace_s = 0.06  # so that all eight have asked before the first is answered, on a busy machine, too
    service = Generation(served_model(ByteTokenizer()), cells, admission=Admission(capacity=2, slots=2))
    async with grpc_server(service) as (address, _):
        load = Load(address, "x", Params(mode="diffusion", max_new_tokens=12))
        await asyncio.gather(*(load.ask() for _ in range(8)))
        outcomes = [one.outcome for one in load.asked]
        assert outcomes.count(ANSWERED) == 2 and outcomes.count(REFUSED) == 6
        assert all(one.hint_s and one.hint_s >= 1 for one in load.asked if one.outcome == REFUSED)
        assert all(one.first is not None and one.began < one.first <= one.ended for one in load.asked if not one.hint_s)

        cells.pace_s = 0.01

        def dies(request: AnyRequest, block: int) -> None:
            if block:
                raise Unavailable("gone")

        cells.fail = dies
        cut = await load.ask()
        assert (cut.outcome, cut.is_cut) == ("UNAVAILABLE", True)
        cells.fail = lambda request, block: None
        await load.arrivals(per_second=50, seconds=0.1)
        await load.clients(2, 0.05)
        rest = [one.outcome for one in load.asked[9:]]
        assert len(rest) >= 5 + 2 and ANSWERED in rest and set(rest) <= {ANSWERED, REFUSED}
        await load.close()


def served(began: float, first: float, ended: float, outcome: str = ANSWERED, hint_s: float | None = None) -> Asked:
    return Asked(began, None if outcome == REFUSED else first, ended, outcome, hint_s)


def test_a_wave_tells_when_cells_came_and_went_and_what_was_cut(tmp_path: Path) -> None:
    asked = [served(t, t + 0.2, t + 1.0) for t in range(30)] + [served(12, 12.5, 13, "UNAVAILABLE")]
    cells = [(0.0, 1), (14.0, 2), (16.5, 3), (25.0, 2), (28.0, 1)]
    wave = Wave([0.0, 10.0, 20.0, 30.0], asked, cells, [(0.0, 1), (11.5, 3), (27.0, 1)])
    text = wave_text(wave, (1, 20, 1), 3)
    for said in (
        "| burst | 20 | 2–3 | 10 | 0.20 | 0.50 | 1.00 | 1.00 |",
        "processes of all 3 cells after the burst began: 1.5 s",
        "second cell serves: 4.0 s",
        "all 3 cells serve: 6.5 s",
        "back to one cell after the burst ended: 8.0 s",
        "requests: 31: 30 answered, 1 UNAVAILABLE",
        "streams cut: 1",
    ):
        assert said in text, text
    assert wave.serving(7, 0.0) is None and wave.back_to(0, 0.0) is None
    plot(wave, tmp_path / "wave.png")
    assert (tmp_path / "wave.png").stat().st_size > 10_000


def test_an_overload_is_compared_with_the_full_system() -> None:
    full = [served(t, t + 1, t + 2.0) for t in range(10)]
    flood = [served(20 + t, 21 + t, 23.0 + t) for t in range(10)]
    flood += [served(20 + t / 10, 0, 20.005 + t / 10, REFUSED, 1.0 + t / 10) for t in range(90)]
    text = overload_text(Overload([served(0, 0.1, 0.5)], full, flood, [served(40, 40.1, 40.5)], 10.0, 8, 4))
    for said in (
        "| 10 × | 100 | 10 | 90 % | 0 | 3.00 | 3.00 |",
        "p99 of accepted ÷ p99 of a full system: 1.50",
        "refusals with a hint: 90 of 90",
        "hints: 1.0 to 9.9 s, median 5.5 s",
        "a refusal takes: 5 ms, p99 5 ms",
    ):
        assert said in text, text


def test_quantiles_are_values_that_were_measured() -> None:
    assert [quantile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.99)] == [1.0, 2.0, 3.0]


def test_arguments_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--seconds", "0", "--output", "x"])
    assert "--seconds" in capsys.readouterr().err
