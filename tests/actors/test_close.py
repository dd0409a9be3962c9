"""A cell's processes are ended before anything waits for them."""

from typing import Any, cast

from actors.cell_towers import CellTowers
from actors.settings import CellSettings
from tests.goldens import VENDORED


class Hung:
    """A process that reads nothing: its line is closed once all are dead, and not before."""

    def __init__(self, all_of_them: list[Any]) -> None:
        self.all, self.dead, self.closed = all_of_them, False, False

    def kill(self) -> None:
        self.dead = True

    def close_line(self) -> None:
        assert all(engine.dead for engine in self.all)
        self.closed = True


def test_hung_processes_do_not_outlive_their_cell() -> None:
    towers = CellTowers(CellSettings(str(VENDORED / "tt_moe"), device="cpu"), cast(Any, None))
    engines: list[Any] = []
    engines += [Hung(engines), Hung(engines)]
    towers.engines = engines
    towers.kill()
    assert all(engine.closed for engine in engines)
