"""What a cell asks Ray for, without Ray."""

import pytest

from actors.settings import CellSettings, bundles, resolve_device
from twotower.errors import ConfigError


def test_a_cpu_cell_asks_for_slivers_of_cpus_and_no_gpu() -> None:
    asked = bundles(CellSettings("x", device="cpu"))
    assert len(asked) == 3
    assert all("GPU" not in bundle for bundle in asked)
    assert sum(bundle["CPU"] for bundle in asked) < 1


@pytest.mark.parametrize(
    ("placement", "denoisers", "gpus"),
    [("split", 1, [1.0, 1.0]), ("split", 3, [1.0] * 4), ("colocated", 1, [1.0]), ("ar_only", 1, [1.0])],
)
def test_a_gpu_for_each_tower_process(placement: str, denoisers: int, gpus: list[float]) -> None:
    settings = CellSettings("x", device="cuda", placement=placement, denoisers_per_context=denoisers)
    replica, *towers = bundles(settings)
    assert "GPU" not in replica
    assert [tower["GPU"] for tower in towers] == gpus


def test_auto_follows_the_cluster() -> None:
    assert resolve_device("auto", 2) == "cuda"
    assert resolve_device("auto", 0) == "cpu"
    assert resolve_device("cpu", 2) == "cpu"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"placement": "spilt"}, "placement: got 'spilt'"),
        ({"denoisers_per_context": 0}, "denoisers_per_context: got 0"),
        ({"device": "auto"}, "device: got 'auto'"),
    ],
)
def test_impossible_settings(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CellSettings("x", **{"device": "cpu", **changes})  # type: ignore[arg-type]
