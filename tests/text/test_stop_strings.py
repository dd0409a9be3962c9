"""The search finds what `str.find` finds, however the text is cut, and looks at each character a few times at most."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.text.stop_strings import StopSearch

FEW = st.text("ab", min_size=1, max_size=6)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.text("ab", max_size=40), st.lists(FEW, min_size=1, max_size=4), st.lists(st.integers(0, 40), max_size=8))
def test_it_finds_what_find_finds(text: str, stop: list[str], cuts: list[int]) -> None:
    search, seen = StopSearch(stop), ""
    for begin, end in pairwise([0, *sorted(cuts), len(text)]):
        piece = text[begin:end]
        seen += piece
        peeked, found = search.peek(piece), search.push(piece)
        places = [seen.find(one) for one in stop if one in seen]
        assert peeked == found
        if found is not None:
            begin = len(seen) - found.before_end
            here = [one for one in stop if seen.startswith(one, begin)]
            assert begin == min(places) and found.text == min(here, key=len)
            return
        assert not places
        assert search.begun == max(n for one in stop for n in range(len(one)) if seen.endswith(one[:n]))


class _Counted(str):
    """A text that counts how often one of its characters is looked at."""

    looks = 0

    def __getitem__(self, place: object) -> str:
        _Counted.looks += 1
        return super().__getitem__(place)  # type: ignore[index]


def test_the_worst_text_costs_two_looks_a_character() -> None:
    """All but the last character of a long stop string, again and again."""
    search, _Counted.looks = StopSearch(["a" * 255 + "b"]), 0
    text = ("a" * 254 + "c") * 20
    for character in text:
        search.push(_Counted(character))
    assert search.begun == 0 and 0 < _Counted.looks <= 3 * len(text)
