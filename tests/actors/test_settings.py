"""What a cell asks Ray for, and what its processes are told, without Ray."""

from dataclasses import asdict, fields
from pathlib import Path

import pytest

from actors.memory import memories
from actors.settings import CellSettings, bundles, resolve_device
from actors.towers import ContextProcess
from cluster.app import cell_settings
from cluster.config import ServiceConfig, load_config
from cluster.placing import choose
from tests.goldens import VENDORED
from twotower.engine.settings import EngineSettings
from twotower.errors import ConfigError
from twotower.exchange.settings import SSM_WIRE_DTYPES
from twotower.model.checkpoint import Checkpoint


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


@pytest.mark.parametrize(
    ("processes", "gpus_per_tower", "there", "device", "why"),
    [
        (2, None, 0, "cpu", "a cell of 2 tower processes wants 2 GPUs, a node has 0"),
        (2, None, 1, "cpu", "a cell of 2 tower processes wants 2 GPUs, a node has 1"),
        (2, None, 2, "cuda", "a cell of 2 tower processes wants 2 GPUs, a node has 2"),
        (2, 0.5, 1, "cuda", "a cell of 2 tower processes wants 1 GPU, a node has 1"),
        (1, None, 1, "cuda", "a cell of 1 tower process wants 1 GPU, a node has 1"),
        (1, 0.0, 1, "cpu", "a cell of 1 tower process wants 0 GPUs, a node has 1"),
    ],
)
def test_auto_is_cuda_only_where_a_cell_fits(
    processes: int, gpus_per_tower: float | None, there: float, device: str, why: str
) -> None:
    choice = resolve_device("auto", processes, gpus_per_tower, there)
    assert choice.device == device and choice.why == f"device auto is {device}: {why}"


@pytest.mark.parametrize("there", [0, 1, 2])
def test_the_local_configuration_fits_whatever_is_there(there: int) -> None:
    """`make serve` on a machine with any number of GPUs asks for no more than there are."""
    file = Path(__file__).resolve().parents[2] / "deploy" / "serve" / "local.yaml"
    for config in (load_config(None), load_config(file)):
        settings = cell_settings(choose(config, [{"CPU": 8.0, "GPU": float(there)}]).config)
        assert settings.device == ("cuda" if there else "cpu")
        assert settings.placement == ("colocated" if there == 1 else "split")
        assert sum(bundle.get("GPU", 0) for bundle in bundles(settings)) <= there


@pytest.mark.parametrize(("device", "gpus_per_tower"), [("cuda:0", None), ("cuda:1", 2.0), ("cuda:3", 0.0)])
def test_an_index_among_the_gpus_that_a_process_sees(device: str, gpus_per_tower: float | None) -> None:
    """With none of its own, Ray hides none of the node's."""
    settings = CellSettings("x", device=device, gpus_per_tower=gpus_per_tower)
    assert settings.gpus == (1.0 if gpus_per_tower is None else gpus_per_tower)


def test_a_named_device_is_taken_at_its_word() -> None:
    assert resolve_device("cpu", 2, None, 2).device == "cpu"
    assert resolve_device("cuda", 2, None, 0).device == "cuda"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"placement": "spilt"}, "placement: got 'spilt'"),
        ({"denoisers_per_context": 0}, "denoisers_per_context: got 0"),
        ({"placement": "ar_only", "ssm_wire_dtype": "bfloat16"}, "ssm_wire_dtype: got 'bfloat16' with placement ar_"),
        ({"device": "auto"}, "device: got 'auto'"),
        ({"device": "auto", "gpus_per_tower": 0.0}, "device: got 'auto'"),
        ({"device": "auto", "gpus_per_tower": 1.0}, "device: got 'auto'"),
        ({"device": "gpu"}, "device: got 'gpu', wanted auto, cpu, cuda or cuda:N"),
        (
            {"device": "cuda:1"},
            "device: got 'cuda:1', but with gpus_per_tower 1 a tower process sees 1 GPU, wanted cuda",
        ),
        ({"device": "cuda:1", "gpus_per_tower": 0.5}, "gpus_per_tower 0.5 a tower process sees 1 GPU, wanted cuda or"),
        ({"device": "cuda:2", "gpus_per_tower": 2.0}, "sees 2 GPUs, wanted cuda:0 to cuda:1"),
    ],
)
def test_impossible_settings(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CellSettings("x", **{"device": "cpu", **changes})  # type: ignore[arg-type]


def test_every_setting_of_a_cell_arrives_under_its_own_name() -> None:
    """One that an engine or a cell gets, but no configuration has, could not be set."""
    config = load_config(None)
    sections = [config.model, config.cell, config.cluster]
    have = [name for section in sections for name, _ in section]
    wanted = {field.name for kind in (EngineSettings, CellSettings) for field in fields(kind)} - {"engine"}
    assert wanted <= set(have) and len(have) == len(set(have))

    cell = {"device": "cpu", "placement": "split", "ssm_wire_dtype": "bfloat16", "gpus_per_tower": 0, "capture": "off"}
    cell |= {"denoisers_per_context": 3, "max_sequences": 7, "cache_tokens": 6000, "prefill_chunk_tokens": 9}
    cell |= {"link_timeout_s": 11, "stall_timeout_s": 12, "start_timeout_s": 13, "mend_timeout_s": 14}
    cell |= {"prefix_cache_bytes": 16, "prefix_cache_in": "host"}
    model = {"dtype": "bfloat16", "max_sequence_length": 5000, "experts": "int4", "expert_group": 64}
    changed = ServiceConfig.parse({"cell": cell, "model": model, "cluster": {"max_queued_requests": 15}})
    settings = cell_settings(changed)
    told = {**asdict(settings), **asdict(settings.engine)}
    given = {name: value for section in (changed.model, changed.cell, changed.cluster) for name, value in section}
    plain = {**asdict(CellSettings("x", "cuda")), **asdict(EngineSettings())}
    for name in wanted - {"checkpoint"}:
        assert told[name] == given[name], name
        assert name == "placement" or told[name] != plain[name], f"{name}: this test must change it"


def test_the_defaults_of_a_service_are_the_engines() -> None:
    config = load_config(None, ["cell.placement=split", "cell.device=cpu"])
    assert cell_settings(config).engine == EngineSettings()


async def test_a_link_is_told_what_the_cell_says() -> None:
    engine = EngineSettings(4, 64, link_timeout_s=7, stall_timeout_s=9, capture="off")
    checkpoint = str(VENDORED / "tt_dense")
    settings = CellSettings(checkpoint, device="cpu", engine=engine, ssm_wire_dtype="bfloat16")
    actor = ContextProcess(settings)
    await actor.load()
    try:
        told = (await actor.open_link(0, 1)).settings
    finally:
        actor.runner.stop()
    assert (told.ssm_wire_dtype, told.link_timeout_s, told.stall_timeout_s) == ("bfloat16", 7, 9)


@pytest.mark.parametrize("wire", SSM_WIRE_DTYPES)
def test_a_service_takes_every_wire_of_a_link(wire: str) -> None:
    config = load_config(None, [f"cell.ssm_wire_dtype={wire}", "cell.placement=split", "cell.device=cpu"])
    assert cell_settings(config).link_settings.ssm_wire_dtype == wire


def test_rounded_states_need_smaller_buffers() -> None:
    """Where one chunk of a prompt is more than they would hold anyway."""
    long, checkpoint = EngineSettings(2, 1 << 18, prefill_chunk_tokens=1 << 18), str(VENDORED / "tt_moe")
    eighths, halves, plain = (
        memories(CellSettings(checkpoint, device="cpu", engine=long, ssm_wire_dtype=dtype))[1].staging
        for dtype in ("int8", "bfloat16", "float32")
    )
    assert eighths < halves < plain


def test_rounding_states_needs_a_copy_of_those_of_a_message() -> None:
    cells = [
        CellSettings(str(VENDORED / "tt_moe"), device="cpu", engine=EngineSettings(4, 64), ssm_wire_dtype=wire)
        for wire in ("float32", "int8")
    ]
    (plain, *_), (rounded, denoiser) = map(memories, cells)
    config = Checkpoint.open(VENDORED / "tt_moe").config
    state = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * 4 * len(config.layers_of("M"))
    assert rounded.scratch - plain.scratch == denoiser.scratch - plain.scratch == 4 * state, "four sequences at most"
