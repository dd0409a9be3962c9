"""No request makes a router's loop work for long at a time: the worst of each kind, as `benchmarks.loop_lag` asks them.

What counts is the processor time of the loop's own thread between two beats, which a busy machine does not lengthen.
"""

from functools import cache
from typing import Any

import pytest

from benchmarks.loop_lag import KINDS, lag_of, open_app
from cluster.served_model import ServedModel

_open = cache(open_app)
QUICK = {name for name in KINDS if name.startswith(("text that", "text: ", "stop strings", "an answer"))}
REFUSED = {name for name in KINDS if "million" in name or "300,000" in name or "4 MB" in name}


def _app() -> tuple[Any, ServedModel]:
    return _open()


@pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in KINDS]
)
async def test_the_worst_of_each_kind(kind: str) -> None:
    app, model = _app()
    lag = await lag_of(app, KINDS[kind](model), repeats=1)
    assert lag.statuses == ((400,) if kind in REFUSED else (200,))
    assert lag.work_s < 0.06
