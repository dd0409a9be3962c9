"""What the model takes from a service's answers, and what it makes of them; without a service."""

import asyncio
from pathlib import Path
from random import Random

import pytest

from benchmarks.simulate_parts import validation
from benchmarks.simulate_parts.costs import Line
from benchmarks.simulate_parts.validation import Beside, Fitted, Validation, Watched, _beside, fit, modelled, validate
from benchmarks.verified_parts.bare import COMMIT, STEP
from tests.cluster.fakes import ScriptedCells, generation, grpc_server
from twotower.commands.bench.load import Load
from twotower.commands.bench.samples import Pass, Sample
from twotower.core import Mode
from twotower.errors import ConfigError
from twotower_client import Usage

STEPS, REQUEST_S, STEP_S, COMMIT_S = (2, 3, 5, 9), 0.008, 0.0025, 0.003
ROWS = {STEP: Line(((1, 1.0), (16, 4.0))), COMMIT: Line(((1, 1.0), (16, 3.0)))}


def samples(count: int = 60) -> tuple[Sample, ...]:
    """Of one client: answers of one block or two, each as long as its passes and what a request takes besides."""
    random, made, now = Random(1), [], 0.0
    for number in range(count):
        steps, blocks = STEPS[number % len(STEPS)], 1 + number % 2
        seconds = REQUEST_S + COMMIT_S + steps * STEP_S + (blocks - 1) * COMMIT_S + abs(random.gauss(0.0, 1e-5))
        seconds += 0.5 if number == 30 else 0.0  # the machine did something else
        usage = Usage(12, 16 * blocks, max(steps, blocks), blocks)
        made.append(Sample(number, now, now, now + seconds, (now + seconds,), usage))
        now += seconds
    return tuple(made)


def watched(clients: int = 1) -> Watched:
    told = samples()
    run = Pass("diffusion", Load(clients, None, len(told), None), 0, told, told[-1].end_s, clients, 0.1)
    return Watched(clients, run, beside_s=0.004 * len(told))


def test_what_a_step_a_commit_and_a_request_take_is_found_and_an_outlier_is_not() -> None:
    found = fit(samples())
    assert found.step == pytest.approx(STEP_S, rel=0.02)
    assert found.commit == pytest.approx(COMMIT_S, rel=0.05)
    assert found.beside == pytest.approx(REQUEST_S + COMMIT_S, rel=0.02)


def test_the_model_of_one_client_is_that_client_and_more_of_them_share_passes() -> None:
    found = fit(samples())
    alone, many = (modelled(watched(clients), found, ROWS, (), 1) for clients in (1, 16))
    told = _beside(watched(), alone)
    assert told.p50[1] == pytest.approx(told.p50[0], rel=0.02)
    assert not any(alone.left.values()) and not any(many.left.values())
    assert 2 < alone.seconds / many.seconds < 16


def test_fifteen_percent_of_throughput_and_of_p99_is_what_holds() -> None:
    assert Beside(1, (100.0, 114.0), (1.0, 9.0), (1.0, 0.86)).holds
    assert not Beside(1, (100.0, 116.0), (1.0, 1.0), (1.0, 1.0)).holds
    assert not Beside(1, (100.0, 100.0), (1.0, 1.0), (1.0, 1.2)).holds


def test_both_are_told_side_by_side() -> None:
    good = Beside(4, (100.0, 110.0), (0.01, 0.01), (0.02, 0.03))
    text = Validation("grpc://127.0.0.1:1", Fitted(0.01, 0.002, 0.003, 0.0), ROWS, (good,), (watched(4),)).text("x")
    assert "| 4 | 100 | 110 | 1.10 | 10.0 | 10.0 | 20.0 | 30.0 | 1.50 | no |" in text
    assert "within 15 %: 0 of 1 loads" in text


def test_a_service_elsewhere_is_refused() -> None:
    with pytest.raises(ConfigError, match="wanted a service on this machine"):
        validate("grpc://example.org:50051", (1,), 10, 1, ())


@pytest.mark.slow
async def test_the_load_goes_to_a_service_and_the_same_requests_into_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Over gRPC, to cells that play a script. CPU time and passes are made up: there are no processes of Serve."""
    spent = iter(float(number) for number in range(100))
    monkeypatch.setattr(validation, "_cpu_beside_towers", lambda: next(spent) / 100)
    monkeypatch.setattr(validation, "passes_by_rows", lambda rows: ROWS)
    cells = ScriptedCells()
    async with grpc_server(generation(cells)) as (address, _):
        found = await asyncio.to_thread(validate, f"grpc://{address}", (1, 4), 12, 1, ())
    assert [one.clients for one in found.beside] == [1, 4] and len(cells.requests) == 12 * 3
    assert {request.params.mode for request in cells.requests} == {Mode.DIFFUSION}
    assert all(one.tokens_per_s[1] > 0 and one.p99[1] > 0 for one in found.beside)
    assert "| 4 | " in found.text("command")
    found.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
