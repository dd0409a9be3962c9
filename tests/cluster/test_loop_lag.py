"""No request makes a router's loop work for long at a time: the worst of each kind, as `benchmarks.loop_lag` asks them.

What counts is the processor time of the loop's own thread between two beats, which a busy machine does not lengthen.
"""

from functools import cache

import pytest

from benchmarks.loop_lag import GRPC_KINDS, KINDS, lag_of, open_faces

_open = cache(open_faces)
QUICK = {name for name in KINDS if name.startswith(("text that", "text: ", "stop strings", "an answer"))}
REFUSED = {name for name in KINDS if "million" in name or "300,000" in name or "4 MB" in name}


@pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in KINDS]
)
async def test_the_worst_of_each_kind(kind: str) -> None:
    http, _, model = _open()
    lag = await lag_of(http, KINDS[kind](model), repeats=1)
    assert lag.statuses == ((400,) if kind in REFUSED else (200,))
    assert lag.work_s < 0.06


@pytest.mark.parametrize("kind", GRPC_KINDS)
async def test_the_worst_of_each_kind_over_grpc(kind: str) -> None:
    """Reading 4 MiB into protobuf's own lists takes some 50 ms; refusing it must not add much."""
    _, grpc, model = _open()
    lag = await lag_of(grpc, GRPC_KINDS[kind](model), repeats=1)
    assert lag.statuses == (3,)
    assert lag.work_s < 0.3
