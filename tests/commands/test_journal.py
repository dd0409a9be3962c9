"""A journal goes on where it was, with the same things only, and nothing in it is lost unasked."""

from pathlib import Path

import pytest

from twotower.commands.journal import Journal
from twotower.errors import ConfigError

ABOUT = {"prompts": "a1", "at once": 16}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "t.part"


def _written(path: Path, *lines: str) -> str:
    journal = Journal(path, ABOUT)
    for line in lines:
        journal.add("pass", line)
    journal.close()
    return path.read_text()


def test_entries_are_there_again(path: Path) -> None:
    assert _written(path, '{"a": 1}', "2") == 'about {"prompts": "a1", "at once": 16}\npass {"a": 1}\npass 2\n'
    journal = Journal(path, ABOUT, resume=True)
    assert journal.resumed and journal.entries == [("pass", '{"a": 1}'), ("pass", "2")]
    journal.add("pass", "3")
    journal.close()
    assert path.read_text().splitlines()[1:] == ['pass {"a": 1}', "pass 2", "pass 3"]


def test_an_entry_is_on_disk_at_once(path: Path) -> None:
    journal = Journal(path, ABOUT)
    journal.add("pass", "1")
    assert path.read_text().endswith("pass 1\n")
    journal.remove()
    assert not path.exists()


def test_what_was_half_written_is_dropped(path: Path) -> None:
    whole = _written(path, "1")
    path.write_text(whole + "pass 2")
    journal = Journal(path, ABOUT, resume=True)
    assert journal.entries == [("pass", "1")] and path.read_text() == whole
    journal.close()


def test_it_is_neither_erased_nor_gone_on_with_unasked(path: Path) -> None:
    whole = _written(path, "1")
    with pytest.raises(ConfigError, match="--resume continues it, --overwrite replaces it"):
        Journal(path, ABOUT)
    with pytest.raises(ConfigError, match="at once was 16, now it is 3"):
        Journal(path, {**ABOUT, "at once": 3}, resume=True)
    assert path.read_text() == whole
    anew = Journal(path, {**ABOUT, "at once": 3}, overwrite=True)
    assert not anew.resumed and not anew.entries
    anew.close()


def test_one_in_which_nothing_was_found_is_in_nobodys_way(path: Path) -> None:
    Journal(path, ABOUT).close()
    assert not path.exists()
    with pytest.raises(ConfigError, match="there is no earlier run to continue"):
        Journal(path, ABOUT, resume=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"my own prompts\n", "its first line does not name the experiment"),
        (b"no end of line", "its first line does not name the experiment"),
        (b"about {broken\n", "Expecting"),
        (b"\xff\n", "can't decode"),
    ],
)
def test_what_is_no_journal_stays_as_it_is(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.part"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        Journal(path, ABOUT, resume=True)
    assert str(path) in str(caught.value) and path.read_bytes() == content


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        Journal(tmp_path / "file" / "t.part", ABOUT)
