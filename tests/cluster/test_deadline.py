"""A deadline counts from where it is made, and ends what waits under it."""

import asyncio

import pytest

from cluster.runs.deadline import Deadline
from twotower.errors import DeadlineExceeded

PASSED = pytest.raises(DeadlineExceeded, match=r"not finished within 0\.01 s")


async def test_what_is_left() -> None:
    deadline = Deadline.after(0.01)
    assert 0 < deadline.left_s() <= 0.01
    await asyncio.sleep(0.02)
    with PASSED:
        deadline.left_s()


async def test_what_waits_under_it() -> None:
    with PASSED:
        async with Deadline.after(0.01).over():
            await asyncio.sleep(60)
    async with Deadline.after(60).over():
        await asyncio.sleep(0)


async def test_a_timeout_of_something_else_stays_one() -> None:
    with pytest.raises(TimeoutError) as caught:
        async with Deadline.after(60).over():
            raise TimeoutError("not ours")
    assert not isinstance(caught.value, DeadlineExceeded) and str(caught.value) == "not ours"
