"""What samples come to."""

import json
import math
import statistics

import pytest

from twotower.commands.bench.figures import Distribution, Spread, figures_of, percentile
from twotower.commands.bench.load import Load
from twotower.commands.bench.samples import Pass, Sample
from twotower_client import Usage

LOAD = Load(2, None, 4, None)


def sample(number: int, due: float = 0.0, error: str | None = None, **usage: int) -> Sample:
    """The first block after 1 s, then one each half second; 3 blocks."""
    return Sample(number, due, due + 0.25, due + 2.0, (due + 1.0, due + 1.5, due + 2.0), Usage(**usage), error)


def test_percentiles() -> None:
    values = [float(value) for value in range(1, 102)]
    told = Distribution.of(reversed(values))
    assert (told.count, told.mean, told.p50, told.p90, told.p99, told.most) == (101, 51, 51, 91, 100, 101)
    uneven = sorted([3.0, 1.0, 4.0, 1.5, 9.0])
    deciles = statistics.quantiles(uneven, n=10, method="inclusive")
    assert [percentile(uneven, share / 10) for share in range(1, 10)] == pytest.approx(deciles)
    assert Distribution.of([7.0]) == Distribution(1, 7, 7, 7, 7, 7)
    assert Distribution.of([]).count == 0 and math.isnan(Distribution.of([]).p50)


def test_times_and_rates() -> None:
    usage = {"completion_tokens": 10, "num_steps": 4, "num_blocks": 3, "num_drafted": 12, "num_accepted": 6}
    first = Pass("verified", LOAD, 0, (sample(0, **usage), sample(1, **usage)), 4.0, 2, 0.5)
    second = Pass("verified", LOAD, 1, (sample(0, **usage), sample(1, 0.0, "UNAVAILABLE")), 2.0, 1, 1.0)
    told = figures_of([first, second], "ar")
    assert (told.mode, told.load, told.rounds, told.requests) == ("verified", "2 clients", 2, 4)
    assert told.errors == {"UNAVAILABLE": 1} and told.failed == 1
    assert told.tokens_per_s == Spread(5.0, 5.0, 5.0) and told.requests_per_s == Spread(0.5, 0.5, 0.5)
    assert (told.first_token.p50, told.between_blocks.p50, told.latency.p99) == (1.0, 0.5, 2.0)
    assert (told.first_token.count, told.between_blocks.count, told.sent_late.count) == (3, 6, 4)
    assert (told.tokens_per_answer, told.tokens_per_step, told.accepted_per_round) == (10, 2.5, 2.0)
    assert told.most_in_flight == 2 and told.client_cpu_share == pytest.approx(0.25)


def test_rounds_of_auto_are_its_blocks_that_are_neither() -> None:
    usage = Usage(0, 20, 4, num_blocks=6, num_drafted=8, num_accepted=6, num_ar_blocks=3, num_diffusion_blocks=1)
    one = Pass(None, LOAD, 0, (Sample(0, 0, 0, 1, (1,), usage),), 1.0, 1, 0.0)
    told = figures_of([one], "auto")
    assert told.accepted_per_round == 3.0 and told.mode == "auto"


def test_what_is_not_there_is_null() -> None:
    """`ar` has no step; where all failed there is no time. JSON has no NaN."""
    ar = figures_of([Pass("ar", LOAD, 0, (sample(0, completion_tokens=3, num_blocks=3),), 1.0, 1, 0.0)], "")
    assert ar.tokens_per_step is None and ar.accepted_per_round is None
    none = figures_of([Pass("ar", LOAD, 0, (sample(0, 0.0, "INTERNAL"),), 1.0, 1, 0.0)], "")
    told = json.loads(json.dumps(none.as_json(), allow_nan=False))
    assert told["latency"]["p50"] is None and told["tokens_per_s"]["mean"] == 0 and told["tokens_per_answer"] is None
