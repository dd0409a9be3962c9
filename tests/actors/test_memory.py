"""Every process of a cell has its memory worked out, without Ray."""

import pytest

from actors.memory import memories
from actors.settings import CellSettings, bundles
from tests.goldens import VENDORED

CHECKPOINT = str(VENDORED / "tt_moe")


@pytest.mark.parametrize(
    ("placement", "denoisers", "links"),
    [("split", 1, [1, 1]), ("split", 2, [2, 1, 1]), ("colocated", 1, [0]), ("ar_only", 1, [0])],
)
def test_one_for_each_tower_process(placement: str, denoisers: int, links: list[int]) -> None:
    settings = CellSettings(CHECKPOINT, device="cpu", placement=placement, denoisers_per_context=denoisers)
    found = memories(settings)
    assert len(found) == len(bundles(settings)) - 1
    buffer = found[0].staging // (3 * links[0]) if links[0] else 0
    assert [memory.staging for memory in found] == [3 * count * buffer for count in links]
    assert len({memory.slots + memory.pages for memory in found}) == 1


def test_weights_are_counted_where_they_are() -> None:
    settings = {
        name: CellSettings(CHECKPOINT, device="cpu", placement=name) for name in ("split", "colocated", "ar_only")
    }
    weights = {name: [memory.weights for memory in memories(cell)] for name, cell in settings.items()}
    assert sum(weights["split"]) == weights["colocated"][0] > weights["split"][0] == weights["ar_only"][0]
