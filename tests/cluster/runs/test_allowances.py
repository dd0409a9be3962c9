"""What a key allows at a time and in a minute, and who is refused for it."""

from contextlib import ExitStack

import pytest

from cluster.runs.allowances import Allowances, LimitReached
from cluster.runs.answer import Usage
from cluster.runs.callers import NOBODY, Caller, Limits
from cluster.runs.record import Record
from twotower.core import DecodingParams, Request, RequestId, ScoreRequest
from twotower.errors import InvalidRequest, Overloaded

NOW = [0.0]


def allowances() -> Allowances:
    NOW[0] = 100.0
    return Allowances(lambda: NOW[0])


def test_so_many_at_a_time() -> None:
    allowed, caller, other = allowances(), Caller("a", Limits(concurrent_requests=3)), Caller("b", Limits(1))
    with ExitStack() as held:
        held.enter_context(allowed.hold(2, caller))
        held.enter_context(allowed.hold(1, caller))
        held.enter_context(allowed.hold(1, other))
        with pytest.raises(LimitReached, match="4 requests at a time with this key, wanted at most 3") as caught:
            held.enter_context(allowed.hold(1, caller))
        assert (caught.value.key, caught.value.limit) == ("a", "concurrent_requests")
        assert isinstance(caught.value, Overloaded) and caught.value.retry_after_s == 1.0
    for _ in range(2):
        with allowed.hold(3, caller):
            pass
    assert not allowed._running


def test_a_call_that_never_fits_is_a_mistake() -> None:
    with pytest.raises(InvalidRequest, match="prompt: got 4 at a time, wanted at most 3 with this key"):
        allowances().hold(4, Caller("a", Limits(concurrent_requests=3))).__enter__()


def test_whoever_has_no_limits_has_none() -> None:
    allowed = allowances()
    with allowed.hold(10_000, NOBODY), allowed.hold(10_000, NOBODY):
        allowed.check_priority(-(2**31), NOBODY)


def _record(caller: Caller, prompt: int, answer: int, placed: bool = True) -> Record:
    request = Request(RequestId("r"), (5,) * prompt, DecodingParams())
    record = Record(request, "f", caller=caller)
    record.usage = Usage(prompt, answer)
    record.attempts = ["cell"] if placed else []
    return record


def test_tokens_of_a_minute_come_back_with_time() -> None:
    allowed, caller = allowances(), Caller("a", Limits(tokens_per_minute=60))
    with allowed.hold(1, caller):
        pass
    allowed.ended(_record(caller, prompt=50, answer=40), None)
    with pytest.raises(LimitReached, match="the 60 tokens a minute of this key are used up") as caught:
        allowed.hold(1, caller).__enter__()
    assert caught.value.retry_after_s == pytest.approx(31.0)
    NOW[0] += 30.9
    with allowed.hold(1, caller):
        pass
    NOW[0] += 1000.0
    assert allowed._tokens_left("a", 60) == 60.0, "those of one minute are kept"


def test_scores_count_and_what_no_cell_has_read_does_not() -> None:
    allowed, caller = allowances(), Caller("a", Limits(tokens_per_minute=60))
    allowed.ended(_record(caller, prompt=500, answer=0, placed=False), None)
    assert allowed._tokens_left("a", 60) == 60.0
    scored = Record(ScoreRequest(RequestId("s"), (1,) * 20, 5), "f", caller=caller, attempts=["cell"])
    allowed.ended(scored, None)
    assert allowed._tokens_left("a", 60) == 40.0


def test_a_priority_that_the_key_does_not_allow() -> None:
    allowed, caller = allowances(), Caller("a", Limits(priority_from=0))
    allowed.check_priority(0, caller)
    with pytest.raises(InvalidRequest, match="priority: got -1, wanted at least 0 with this key"):
        allowed.check_priority(-1, caller)
