"""What a key allows at a time and in a minute, and who is refused for it."""

from contextlib import ExitStack

import pytest

from cluster.runs.allowances import Allowances, LimitReached, Wish
from cluster.runs.answer import Usage
from cluster.runs.callers import NOBODY, Caller, Limits
from cluster.runs.record import Record
from twotower.core import DecodingParams, Request, RequestId, ScoreRequest
from twotower.errors import InvalidRequest, Overloaded

NOW = [0.0]


def allowances() -> Allowances:
    NOW[0] = 100.0
    return Allowances(lambda: NOW[0])


def caller(name: str = "a", requests: int | None = None, tokens: int | None = None, routers: int = 1) -> Caller:
    part = [None if whole is None else -(-whole // routers) for whole in (requests, tokens)]
    return Caller(name, Limits(part[0], part[1], None, (requests, tokens)))


def refusal(allowed: Allowances, wish: Wish, who: Caller) -> LimitReached:
    with pytest.raises(LimitReached) as caught, allowed.hold(wish, who):
        pass
    assert isinstance(caught.value, Overloaded) and caught.value.key == who.name
    return caught.value


def test_so_many_at_a_time() -> None:
    allowed, who, other = allowances(), caller(requests=3), caller("b", requests=1)
    with ExitStack() as held:
        held.enter_context(allowed.hold(Wish(2), who))
        held.enter_context(allowed.hold(Wish(1), who))
        held.enter_context(allowed.hold(Wish(1), other))
        refused = refusal(allowed, Wish(1), who)
        assert "4 requests at a time with this key, wanted at most 3 here" in str(refused)
        assert (refused.limit, refused.retry_after_s) == ("concurrent_requests", 1.0)
    for _ in range(2):
        with allowed.hold(Wish(3), who):
            pass


def test_a_call_that_never_fits_is_a_mistake() -> None:
    allowed = allowances()
    for wish, words in (
        (Wish(4), "prompt: got 4 at a time, wanted at most 3"),
        (Wish(1, 61), "got 61 tokens of prompt"),
    ):
        with pytest.raises(InvalidRequest, match=words), allowed.hold(wish, caller(requests=3, tokens=60)):
            pass


def test_a_call_within_the_whole_limit_goes_alone_beyond_a_routers_part() -> None:
    """Or the number of routers would decide what a key may ask at all."""
    allowed, who = allowances(), caller(requests=8, tokens=800, routers=4)
    with allowed.hold(Wish(4, 700), who):
        refusal(allowed, Wish(1), who)
    with allowed.hold(Wish(1, 10), who):
        assert refusal(allowed, Wish(4), who).limit == "concurrent_requests"
        assert refusal(allowed, Wish(1, 700), who).limit == "tokens_per_minute"
    allowed.ended(_record(who, prompt=1, answer=0), None)
    assert refusal(allowed, Wish(1, 700), who).retry_after_s == 1.0, "its part is not whole"


def test_whoever_has_no_limits_has_none() -> None:
    allowed = allowances()
    with allowed.hold(Wish(10_000, 10**9), NOBODY), allowed.hold(Wish(10_000), NOBODY):
        allowed.check_priority(-(2**31), NOBODY)
    assert not allowed._accounts


def _record(who: Caller, prompt: int, answer: int, placed: bool = True) -> Record:
    record = Record(Request(RequestId("r"), (5,) * prompt, DecodingParams()), "f", caller=who)
    record.usage = Usage(prompt, answer)
    record.attempts = ["cell"] if placed else []
    return record


def test_what_is_under_way_counts_with_the_most_that_it_may_take() -> None:
    allowed, who = allowances(), caller(tokens=60)
    with allowed.hold(Wish(1, 40), who):
        refused = refusal(allowed, Wish(1, 21), who)
        assert "20 of this key's 60 tokens a minute are left here, wanted 21" in str(refused)
        with allowed.hold(Wish(1, 20), who):
            refusal(allowed, Wish(1, 1), who)
    with allowed.hold(Wish(1, 60), who):
        pass


def test_tokens_of_a_minute_come_back_with_time() -> None:
    allowed, who = allowances(), caller(tokens=60)
    allowed.ended(_record(who, prompt=30, answer=20), None)
    with allowed.hold(Wish(1, 10), who):
        pass
    refused = refusal(allowed, Wish(1, 40), who)
    assert refused.limit == "tokens_per_minute" and refused.retry_after_s == pytest.approx(30.0)
    NOW[0] += 29.9
    refusal(allowed, Wish(1, 40), who)
    NOW[0] += 0.2
    with allowed.hold(Wish(1, 40), who):
        pass
    NOW[0] += 1000.0
    assert allowed._account(who).left == 60.0, "those of one minute are kept"


def test_scores_count_and_what_no_cell_has_read_does_not() -> None:
    allowed, who = allowances(), caller(tokens=60)
    allowed.ended(_record(who, prompt=500, answer=0, placed=False), None)
    assert allowed._account(who).left == 60.0
    scored = Record(ScoreRequest(RequestId("s"), (1,) * 20, 5), "f", caller=who, attempts=["cell"])
    allowed.ended(scored, None)
    assert allowed._account(who).left == 40.0


def test_a_priority_that_the_key_does_not_allow() -> None:
    allowed, who = allowances(), Caller("a", Limits(priority_from=0))
    allowed.check_priority(0, who)
    with pytest.raises(InvalidRequest, match="priority: got -1, wanted at least 0 with this key"):
        allowed.check_priority(-1, who)
