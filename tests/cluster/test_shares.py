"""How much one caller may hold of what all hold together."""

import pytest

from cluster.runs.shares import Shares
from twotower.errors import Overloaded


def test_one_address_cannot_take_all() -> None:
    shares = Shares(8, "bodies")
    for _ in range(6):
        shares.take("greedy")
    with pytest.raises(Overloaded, match="bodies: 7 at a time of one caller, wanted at most 2 under this load"):
        shares.take("greedy")
    shares.take("modest")
    shares.take("modest")
    with pytest.raises(Overloaded, match="bodies: 9 at a time, wanted at most 8"):
        shares.take("late")
    shares.give_back("greedy")
    with pytest.raises(Overloaded, match="3 at a time of one caller"):
        shares.take("modest")
    shares.take("late")


def test_units_are_taken_together_or_not_at_all() -> None:
    shares = Shares(100, "bytes")
    shares.take("a", 70)
    for units, words in ((31, "bytes: 101 at a time, wanted"), (6, "of one caller")):
        with pytest.raises(Overloaded, match=words):
            shares.take("a", units)
        assert shares.total == 70
    shares.take("a", 5)
    shares.take("b", 25)
    assert shares.total == 100


def test_an_address_that_holds_nothing_is_forgotten() -> None:
    shares = Shares(100, "bytes")
    for number in range(1000):
        shares.take(str(number), 3)
        shares.give_back(str(number), 3)
        shares.take(str(number), 0)
        shares.give_back(str(number), 0)
    assert shares.total == 0 and not shares._held
    with pytest.raises(Overloaded):
        shares.take("refused", 101)
    assert not shares._held
