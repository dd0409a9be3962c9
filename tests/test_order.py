"""The order in which workers take the files of tests."""

from types import SimpleNamespace
from typing import Any

from tests.conftest import LONG, TESTS, pytest_collection_modifyitems


def _ordered(*files: tuple[str, bool], worker: bool = True) -> list[str]:
    """Names of files, each of which may start Ray."""
    items: Any = [
        SimpleNamespace(path=TESTS / name, get_closest_marker=lambda _, starts_ray=starts_ray: starts_ray)
        for name, starts_ray in files
    ]
    config: Any = SimpleNamespace(**({"workerinput": {}} if worker else {}))
    pytest_collection_modifyitems(config, items)
    return [str(item.path.relative_to(TESTS)) for item in items]


def test_every_long_file_is_there() -> None:
    assert [name for name in LONG if not (TESTS / name).is_file()] == []


def test_the_longest_first_then_what_needs_no_ray_then_the_long_ones() -> None:
    files = (("a.py", True), ("b.py", False), (LONG[2], True), (LONG[1], True), (LONG[0], True), ("c.py", False))
    assert _ordered(*files) == [LONG[0], "b.py", "c.py", LONG[1], LONG[2], "a.py"]
    assert _ordered(*files, worker=False) == [name for name, _ in files]
