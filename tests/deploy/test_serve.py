"""What `deploy/serve` asks for: the planner finds room for it, and so does what a tower process checks before it loads.

The released checkpoint is there as headers alone (`tests/model/released_files.py`).
"""

import re
from pathlib import Path

import pytest

from actors.memory import memories
from actors.settings import CellSettings, check_settings
from cluster.config import ServiceConfig, load_config
from tests.model.released_files import headers, write_released
from twotower.core import Mode
from twotower.engine.free_memory import MARGINS
from twotower.planner.ceilings import Planner
from twotower.planner.devices import DEVICES, Device
from twotower.planner.released import RELEASED

SERVE = Path(__file__).resolve().parents[2] / "deploy" / "serve"
DEVICE_OF = {
    "two_gpus.yaml": "h100",
    "one_h200.yaml": "h200",
    "one_h100_ar_only.yaml": "h100",
    "four_h100.yaml": "h100",
    "one_h100_int4.yaml": "h100",
}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_released(tmp_path_factory.mktemp("released"), headers())


def _cell(config: ServiceConfig, checkpoint: Path) -> CellSettings:
    cell = config.cell
    return CellSettings(
        str(checkpoint), cell.device, config.model.dtype, cell.placement, cell.denoisers_per_context,
        engine=config.engine,
    )  # fmt: skip


def _planner(config: ServiceConfig, device: Device) -> Planner:
    return Planner(RELEASED.with_experts(config.engine.expert_format), device)


def test_every_file_has_its_device() -> None:
    assert {path.name for path in SERVE.glob("*.yaml")} == {*DEVICE_OF, "local.yaml"}


@pytest.mark.parametrize("name", DEVICE_OF)
def test_the_planner_finds_room_for_what_is_asked_and_told(name: str) -> None:
    config, engine = load_config(SERVE / name), load_config(SERVE / name).engine
    towers = 2 if config.cell.placement == "colocated" else 1
    fitting = _planner(config, DEVICES[DEVICE_OF[name]]).sequences(engine.max_sequence_length, towers)
    told = re.search(r"--device (\S+).*`, (\d+) sequences of (\d+) tokens", (SERVE / name).read_text())
    assert told is not None
    assert told.groups() == (DEVICE_OF[name], str(fitting), str(engine.max_sequence_length))
    assert engine.max_sequences <= fitting


@pytest.mark.parametrize("name", DEVICE_OF)
@pytest.mark.slow
def test_every_process_fits_its_gpu(name: str, released: Path) -> None:
    """The sum that a tower process makes, with what a pass needs for a moment and the margin."""
    config = load_config(SERVE / name)
    settings = _cell(config, released)
    modes = check_settings(settings)
    assert modes == ((Mode.AR,) if config.cell.placement == "ar_only" else tuple(Mode))
    processes = memories(settings)
    assert len(processes) == settings.processes
    for memory in processes:
        assert memory.total + memory.passing + MARGINS["cuda"] < DEVICES[DEVICE_OF[name]].memory, memory


def test_both_towers_fit_80_gb_with_quantised_experts_alone(released: Path) -> None:
    config = load_config(SERVE / "one_h100_int4.yaml", ["model.experts=stored", "model.expert_group=0"])
    [memory] = memories(_cell(config, released))
    assert memory.weights > DEVICES["h100"].memory
    assert _planner(config, DEVICES["h100"]).sequences(1024, 2) == 0
