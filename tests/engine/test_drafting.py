"""When a sequence drafts, and when it goes on token by token."""

from twotower.engine.modes.drafting import Drafting


def played(drafting: Drafting, accepted: int, rounds: int, steps: int = 2) -> list[int]:
    """The rounds that had a draft, where each draft of so many steps has so much accepted."""
    drafted = []
    for number in range(rounds):
        if not drafting.alone(1000):
            drafted.append(number)
            drafting.ended(steps, accepted)
    return drafted


def test_it_drafts_while_more_is_accepted_than_it_takes_steps() -> None:
    assert played(Drafting(), 2, 20) == played(Drafting(), 15, 20) == list(range(20))


def test_it_rests_longer_and_longer_where_nothing_is_accepted() -> None:
    assert played(Drafting(), 0, 60) == [0, 2, 5, 10, 19, 36]
    drafted = played(Drafting(), 0, 1000)
    assert drafted[-1] - drafted[-2] == 65, "and no longer than this"


def test_one_bad_draft_among_good_ones_changes_nothing() -> None:
    drafting = Drafting()
    played(drafting, 10, 8)
    drafting.ended(2, 0)
    assert not drafting.alone(1000)


def test_it_drafts_again_once_that_pays() -> None:
    drafting = Drafting()
    played(drafting, 0, 60)
    drafted = played(drafting, 12, 60)
    assert len(drafted) > 30 and drafted[-20:] == list(range(40, 60))
