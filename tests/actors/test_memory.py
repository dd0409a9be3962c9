"""Every process of a cell has its memory worked out, without Ray."""

from typing import Any

import pytest

from actors import cell_towers
from actors.cell import _ledger, start_pair
from actors.memory import memories
from actors.remote import RemoteEngine
from actors.settings import CellSettings, bundles
from actors.towers import ColocatedProcess, ContextProcess, DenoiserProcess, TowerProcess
from tests.goldens import VENDORED
from twotower.engine import free_memory
from twotower.engine.memory import together
from twotower.errors import ConfigError

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


@pytest.mark.parametrize("gpus_per_tower", [None, 0.0, 0.5, 1.0])
def test_a_device_in_words_is_counted_as_what_it_is(gpus_per_tower: float | None) -> None:
    """Whatever is asked of Ray for it. `auto` never comes here: settings refuse it (test_settings.py). What differs is
    the two pages beside those of sequences, which are larger on a GPU."""
    cpu, gpu = (
        memories(CellSettings(CHECKPOINT, device=device, placement="colocated", gpus_per_tower=gpus_per_tower))[0]
        for device in ("cpu", "cuda")
    )
    assert cpu.total - cpu.pages == gpu.total - gpu.pages
    assert cpu.tokens == gpu.tokens and cpu.pages < gpu.pages
    assert gpu.pages / cpu.pages == pytest.approx((gpu.tokens + 2 * 256) / (cpu.tokens + 2 * 16))
    assert cpu.passing < gpu.passing


@pytest.mark.parametrize(("device", "page_tokens"), [("cpu", 16), ("cuda", 256), ("cuda:0", 256)])
def test_a_cells_ledger_counts_as_its_towers_will(device: str, page_tokens: int) -> None:
    settings = CellSettings(CHECKPOINT, device=device, placement="split", denoisers_per_context=2)
    ledger = _ledger(settings)
    for room in (ledger.context, *ledger.mirrors):
        assert (room.page_tokens, room.pages) == (page_tokens, settings.engine.pages_of(page_tokens))
    assert len(ledger.mirrors) == 2


@pytest.mark.parametrize(
    ("actor", "placement", "number"),
    [(ContextProcess, "split", 0), (DenoiserProcess, "split", 1), (ColocatedProcess, "ar_only", 0)],
)
async def test_a_tower_process_that_does_not_fit_reads_no_weights(
    actor: type[TowerProcess], placement: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CellSettings(CHECKPOINT, device="cpu", placement=placement)
    memory = memories(settings)[number]
    wanted = memory.total + memory.passing + free_memory.MARGINS["cpu"]
    monkeypatch.setattr(actor, "_load", lambda _: pytest.fail("weights were read"))
    monkeypatch.setattr(free_memory, "free_bytes", lambda _: wanted - 1)
    with pytest.raises(
        ConfigError, match=r"GiB free on cpu, wanted .* = weights .* margin 0\.06; change max_sequences"
    ):
        await actor(settings).load()


async def test_tower_processes_share_one_memory_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone would fit. A process says so before any loads."""
    settings = CellSettings(CHECKPOINT, device="cpu", placement="split")
    both = together(memories(settings))
    monkeypatch.setattr(free_memory, "free_bytes", lambda _: both.total + both.passing)
    with pytest.raises(ConfigError, match="GiB free on cpu"):
        await ContextProcess(settings).check_room()


def test_two_towers_in_one_process_count_once_together() -> None:
    [one] = memories(CellSettings(CHECKPOINT, device="cpu", placement="colocated"))
    context, denoiser = memories(CellSettings(CHECKPOINT, device="cpu", placement="split"))
    assert one.weights == context.weights + denoiser.weights
    assert one.pages == context.pages == denoiser.pages
    # One tower computes at a time; what penalties keep is the context tower's.
    assert max(context.passing, denoiser.passing) <= one.passing < context.passing + denoiser.passing


async def test_a_cell_on_a_cpu_asks_whether_all_fit_before_any_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Full(RemoteEngine):
        async def call(self, method: str, *_: object, timeout_s: float | None = None) -> Any:
            asked.append(method)
            raise ConfigError("memory: too little")

        def kill(self) -> None:
            asked.append("kill")

    monkeypatch.setattr(cell_towers, "start_tower", lambda *_: Full(None, "tower", 1.0))
    with pytest.raises(ConfigError, match="too little"):
        await start_pair(CellSettings(CHECKPOINT, device="cpu", placement="split"), None)  # type: ignore[arg-type]
    assert asked == ["check_room", "kill", "kill"]
