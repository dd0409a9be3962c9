"""Checkpoint directories, whole and broken: every layout the released files use, and one line for every damage."""

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import twotower.model.checkpoint as checkpoint_module
from tests.goldens import CPU, VENDORED, vendored
from tests.model.checkpoints import (
    INDEX,
    SINGLE,
    base_tensors,
    config_of,
    tensors_of,
    write,
    write_config,
    write_sharded,
)
from twotower.config import ModelConfig
from twotower.core import Mode
from twotower.errors import CheckpointError
from twotower.model.checkpoint import Checkpoint, Layout
from twotower.model.loading import load_context_tower, load_denoiser_tower, save_checkpoint, stored_tensors
from twotower.model.tower import Tower

MODEL = "tt_moe"
Change = Callable[[dict[str, Tensor]], None]


def _load(directory: Path) -> tuple[Tower, Tower]:
    checkpoint = Checkpoint.open(directory)
    return (
        load_context_tower(checkpoint, CPU, torch.float32),
        load_denoiser_tower(checkpoint, CPU, torch.float32),
    )


def _same(ours: Tower, theirs: Tower) -> None:
    mine, wanted = dict(stored_tensors(ours, Layout.TWO_TOWER)), dict(stored_tensors(theirs, Layout.TWO_TOWER))
    assert mine.keys() == wanted.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, wanted[name]), name


def _message(load: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_single_and_sharded_hold_the_same(tmp_path: Path) -> None:
    tensors, config = tensors_of(MODEL), config_of(MODEL)
    model = vendored(MODEL)
    for directory in (write(tmp_path / "one", tensors, config), write_sharded(tmp_path / "many", tensors, config)):
        context, denoiser = _load(directory)
        _same(context, model.context)
        _same(denoiser, model.denoiser)


def test_every_tensor_of_the_files_is_in_a_tower() -> None:
    for name in ("tt_moe", "tt_dense"):
        model, stored = vendored(name), tensors_of(name)
        ours = dict(stored_tensors(model.context, Layout.TWO_TOWER))
        ours |= dict(stored_tensors(model.denoiser, Layout.TWO_TOWER))
        assert ours.keys() == stored.keys()
        for key, tensor in stored.items():
            assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("name", ["tt_moe", "tt_dense"])
def test_saved_and_loaded_again(name: str, tmp_path: Path) -> None:
    model = vendored(name)
    save_checkpoint(tmp_path, model.checkpoint.config, model.context, model.denoiser)
    reopened = Checkpoint.open(tmp_path)
    assert reopened.config == model.checkpoint.config
    assert reopened.files.keys() == model.checkpoint.files.keys()
    context, denoiser = _load(tmp_path)
    _same(context, model.context)
    _same(denoiser, model.denoiser)


def test_base_serves_ar_only(tmp_path: Path) -> None:
    write(tmp_path, base_tensors(tensors_of(MODEL)), config_of(MODEL))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.layout is Layout.BASE and checkpoint.modes == (Mode.AR,)
    _same(load_context_tower(checkpoint, CPU, torch.float32), vendored(MODEL).context)
    message = _message(lambda: load_denoiser_tower(checkpoint, CPU, torch.float32))
    assert str(tmp_path) in message and "no denoiser tower" in message


def test_foreign_and_old_names(tmp_path: Path) -> None:
    tensors = tensors_of(MODEL)
    tensors["mtp.layers.0.norm.weight"] = torch.zeros(3)
    for tower in ("context_tower", "denoiser_tower"):
        tensors[f"{tower}.embedding.weight"] = tensors.pop(f"{tower}.embeddings.weight")
    context, denoiser = _load(write(tmp_path, tensors, config_of(MODEL)))
    _same(context, vendored(MODEL).context)
    _same(denoiser, vendored(MODEL).denoiser)


def _rename(old: str, new: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[new] = tensors.pop(old)

    return change


def _drop(name: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def _reshape(name: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].flatten()[:-1].clone()

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop("context_tower.layers.0.mixer.A_log"), ["context_tower.layers.0.mixer.A_log", "missing"]),
        (_drop("context_tower.layers.1.mixer.experts.3.up_proj.weight"), ["experts.3.up_proj.weight", "missing"]),
        (_drop("denoiser_tower.layers.3.mixer.q_proj.weight"), ["denoiser_tower.layers.3.mixer.q_proj", "missing"]),
        (_drop("lm_head.weight"), ["lm_head.weight", "missing"]),
        (_drop("scale_shift_tables.3"), ["scale_shift_tables.3", "missing"]),
        (_rename("context_tower.norm_f.weight", "context_tower.norm.weight"), ["norm_f.weight", "missing"]),
        (
            lambda tensors: tensors.update({"context_tower.layers.0.mixer.extra": torch.zeros(1)}),
            [SINGLE, "unexpected", "context_tower.layers.0.mixer.extra"],
        ),
        (lambda tensors: tensors.update({"vision.weight": torch.zeros(1)}), [SINGLE, "unexpected", "vision.weight"]),
        (_reshape("context_lm_head.weight"), [SINGLE, "context_lm_head.weight", "[8191]", "[128, 64]"]),
        (_reshape("t_block.1.bias"), [SINGLE, "t_block.1.bias", "[191]", "[192]"]),
    ],
)
def test_wrong_tensors_are_named(change: Change, words: list[str], tmp_path: Path) -> None:
    tensors = tensors_of(MODEL)
    change(tensors)
    message = _message(lambda: _load(write(tmp_path, tensors, config_of(MODEL))))
    assert all(word in message for word in words), message


def _cut(directory: Path) -> None:
    path = directory / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _scramble(directory: Path) -> None:
    (directory / "model-00002-of-00003.safetensors").write_bytes(b"not a header" * 50)


def _remove(directory: Path) -> None:
    (directory / "model-00002-of-00003.safetensors").unlink()


def _misplace(directory: Path) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["context_tower.layers.0.norm.weight"] = "model-00002-of-00003.safetensors"
    index["weight_map"]["context_tower.layers.0.phantom"] = "model-00002-of-00003.safetensors"
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut, ["model-00002-of-00003.safetensors", "not a whole safetensors file"]),
        (_scramble, ["model-00002-of-00003.safetensors", "not a whole safetensors file"]),
        (_remove, ["model-00002-of-00003.safetensors", "no such file"]),
        (_misplace, ["model-00002-of-00003.safetensors", "context_tower.layers.0", INDEX]),
        (lambda d: (d / INDEX).write_text("{"), [INDEX, "weight_map"]),
        (lambda d: (d / INDEX).write_text("[]"), [INDEX, "weight_map"]),
        (lambda d: (d / INDEX).write_text('{"weight_map": [1]}'), [INDEX, "weight_map"]),
        (lambda d: (d / INDEX).write_bytes(b"\xff\xfe"), [INDEX, "weight_map"]),
        (lambda d: (d / INDEX).unlink(), [INDEX, SINGLE]),
        (lambda d: (d / "config.json").unlink(), ["config.json", "no such file"]),
        (lambda d: (d / "config.json").write_text("{,}"), ["config.json", "not JSON"]),
        (lambda d: (d / "config.json").write_bytes(b'"\xff"'), ["config.json", "not JSON"]),
        (lambda d: (d / "config.json").write_text("[" * 100_000), ["config.json", "not JSON"]),
        (lambda d: (d / "config.json").write_text("7"), ["config.json", "JSON object"]),
    ],
)
def test_damaged_directories_are_named(damage: Callable[[Path], object], words: list[str], tmp_path: Path) -> None:
    write_sharded(tmp_path, tensors_of(MODEL), config_of(MODEL))
    damage(tmp_path)
    message = _message(lambda: _load(tmp_path))
    assert all(word in message for word in words), message


def test_directories_that_are_none(tmp_path: Path) -> None:
    assert "no such directory" in _message(lambda: Checkpoint.open(tmp_path / "nowhere"))
    write(tmp_path, {"model.embed.weight": torch.zeros(1)}, config_of(MODEL))
    assert "no tensor starts with" in _message(lambda: Checkpoint.open(tmp_path))
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).mkdir()
    assert SINGLE in _message(lambda: Checkpoint.open(tmp_path))


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ('"time_step_limit": [0.0, Infinity]', (0.0, float("inf"))),
        ('"time_step_limit": [0.0, {"__float__": "Infinity"}]', (0.0, float("inf"))),
        ('"time_step_limit": null', (0.0, float("inf"))),
        ('"use_cache": true', (0.0, float("inf"))),
        ('"time_step_limit": [0.001, 0.5]', (0.001, 0.5)),
        ('"mamba_dt_limit": [0, 2]', (0.0, 2.0)),
    ],
)
def test_spellings_of_the_time_step_limit(text: str, limit: tuple[float, float], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{" + text + "}")
    assert ModelConfig.load(tmp_path).time_step_limit == limit


def test_other_spellings_of_the_config() -> None:
    values = config_of(MODEL)
    wanted = ModelConfig.from_dict(values)
    words = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
    values["layers_block_type"] = [words[kind] for kind in values.pop("hybrid_override_pattern")]
    aliases = {
        "n_groups": "mamba_n_groups",
        "conv_kernel": "mamba_d_conv",
        "chunk_size": "mamba_chunk_size",
        "use_conv_bias": "mamba_conv_bias",
        "time_step_limit": "mamba_dt_limit",
    }
    for name, alias in aliases.items():
        values[alias] = values.pop(name)
    assert ModelConfig.from_dict(values) == wanted
    both = config_of(MODEL) | {"mamba_n_groups": None, "mamba_d_conv": 7}
    assert ModelConfig.from_dict(both) == wanted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hybrid_override_pattern": "MEM*EM*X"}, ["hybrid_override_pattern", "X", "unknown layer kind"]),
        ({"hybrid_override_pattern": ""}, ["hybrid_override_pattern", "no layers"]),
        ({"hybrid_override_pattern": ["M"]}, ["hybrid_override_pattern", "wanted str"]),
        (
            {"hybrid_override_pattern": None, "layers_block_type": ["mamba", "rwkv"]},
            ["layers_block_type", "rwkv", "unknown layer kind"],
        ),
        ({"hybrid_override_pattern": None, "layers_block_type": 8}, ["layers_block_type", "list"]),
        ({"num_hidden_layers": 9}, ["num_hidden_layers", "9", "8"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'", "int"]),
        ({"hidden_size": 0}, ["hidden_size", "0", "at least 1"]),
        ({"vocab_size": True}, ["vocab_size", "True"]),
        ({"n_groups": 3}, ["mamba_num_heads", "n_groups"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok", "9", "8"]),
        ({"topk_group": 3}, ["topk_group", "3", "2"]),
        ({"time_step_limit": 5}, ["time_step_limit", "5", "two numbers"]),
        ({"time_step_limit": [0.0]}, ["time_step_limit", "two numbers"]),
        ({"time_step_limit": [0.0, "wide"]}, ["time_step_limit", "wide", "two numbers"]),
        ({"vocab_size": 20_000_000}, ["vocab_size", "20000000", "16777216"]),
        ({"eos_token_id": 5000}, ["eos_token_id", "5000", "from 0 to 127"]),
        ({"eos_token_id": -1}, ["eos_token_id", "-1", "from 0 to 127"]),
        ({"eos_token_id": [2, 5000]}, ["eos_token_id", "[2, 5000]", "int"]),
        ({"bos_token_id": 128}, ["bos_token_id", "128", "from 0 to 127"]),
        ({"pad_token_id": -1}, ["pad_token_id", "-1", "from 0 to 127"]),
        ({"mask_token_id": 7}, ["mask_token_id", "got 7", "wanted 3"]),
        ({"mamba_hidden_act": "tanh"}, ["mamba_hidden_act", "tanh"]),
        ({"mlp_hidden_act": "tanh"}, ["mlp_hidden_act", "tanh"]),
    ],
)
def test_wrong_configs_are_named(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    write_config(tmp_path, config_of(MODEL) | change)
    message = _message(lambda: load_context_tower(_headless(tmp_path), CPU, torch.float32))
    assert all(word in message for word in words), message


def _headless(directory: Path) -> Checkpoint:
    save_file({"backbone.norm_f.weight": torch.zeros(1)}, directory / SINGLE)
    return Checkpoint.open(directory)


class _Reads:
    """Stands in for safe_open: notes which tensors are read, and how many of them are in memory at a time."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.opened: list[str] = []
        self.most_open = self._open = 0
        self.most_alive = 0
        self._storages: list[weakref.ref[Any]] = []

    def __call__(self, path: Path, framework: str) -> "_Reads":
        self._file = safe_open(path, framework=framework)
        self.opened.append(path.name)
        return self

    def __enter__(self) -> "_Reads":
        self._file.__enter__()
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)
        self._open -= 1

    def keys(self) -> Iterator[str]:
        return iter(self._file.keys())

    def get_slice(self, name: str) -> Any:
        return self._file.get_slice(name)

    def get_tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        self.names.append(name)
        self._storages = [ref for ref in self._storages if ref() is not None]
        self._storages.append(weakref.ref(tensor.untyped_storage()))
        self.most_alive = max(self.most_alive, len(self._storages))
        return tensor


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> _Reads:
    reads = _Reads()
    monkeypatch.setattr(checkpoint_module, "safe_open", reads)
    return reads


def test_a_process_with_one_tower_reads_only_its_tensors(reads: _Reads) -> None:
    checkpoint = Checkpoint.open(VENDORED / MODEL)
    assert not reads.names
    load_context_tower(checkpoint, CPU, torch.float32)
    context = set(reads.names)
    assert context == {name for name in checkpoint.files if name.startswith("context_")}
    assert len(reads.names) == len(context)
    reads.names.clear()
    load_denoiser_tower(checkpoint, CPU, torch.float32)
    assert set(reads.names) == set(checkpoint.files) - context


def test_a_shard_is_opened_once_for_its_shapes_and_once_for_its_tensors(tmp_path: Path, reads: _Reads) -> None:
    """Its header tells of every tensor in it: reading that anew for each takes the square of their number."""
    checkpoint = Checkpoint.open(write_sharded(tmp_path, tensors_of(MODEL), config_of(MODEL)))
    shards = sorted({path.name for name, path in checkpoint.files.items() if name.startswith("context_")})
    assert len(shards) > 1
    reads.opened.clear()
    load_context_tower(checkpoint, CPU, torch.float32)
    assert reads.opened == shards * 2 and reads.most_open == 1
    one = Checkpoint.open(VENDORED / MODEL)
    reads.opened.clear()
    load_context_tower(one, CPU, torch.float32)
    assert reads.opened == [SINGLE] * 2


def test_a_big_shard_is_opened_anew_now_and_then(reads: _Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of a mapped file counts as the process's memory."""
    checkpoint, most = Checkpoint.open(VENDORED / MODEL), 50_000
    monkeypatch.setattr(checkpoint_module, "_MAPPED_BYTES", most)
    reads.opened.clear()
    tower = load_context_tower(checkpoint, CPU, torch.float32)
    read = sum(tensor.nbytes for tensor in tower.state_dict().values())
    assert 1 < len(reads.opened) <= 1 + read // most and reads.most_open == 1
    _same(tower, vendored(MODEL).context)


def test_a_reader_goes_on_after_a_shard_that_is_not_there(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_sharded(tmp_path, tensors_of(MODEL), config_of(MODEL)))
    first, *_, last = sorted(checkpoint.files, key=lambda name: checkpoint.files[name].name)
    checkpoint.files[last].unlink()
    with checkpoint.reading() as reader:
        wanted = reader.tensor(first)
        assert "no such file" in _message(lambda: reader.tensor(last))
        assert torch.equal(reader.tensor(first), wanted)
        assert f"no tensor {'x'!r}" in _message(lambda: reader.tensor("x"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_host_memory_holds_the_tower_and_one_tensor(dtype: torch.dtype, reads: _Reads) -> None:
    tower = load_context_tower(Checkpoint.open(VENDORED / MODEL), CPU, dtype)
    assert len(reads.names) > 50
    assert reads.most_alive == 1
    for name, tensor in tower.state_dict().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} holds on to more than itself"


def test_bf16_keeps_the_sensitive_vectors_in_fp32() -> None:
    tower = load_context_tower(Checkpoint.open(VENDORED / MODEL), CPU, torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in tower.state_dict().items()}
    exact = {name.rsplit(".", 1)[1] for name, kind in kinds.items() if kind is torch.float32}
    assert exact == {"A_log", "D", "dt_bias", "weight", "e_score_correction_bias"}
    assert all("gate" in name for name, kind in kinds.items() if name.endswith("weight") and kind is torch.float32)


def test_a_vocabulary_is_that_of_the_ids_and_the_tokenizer_not_of_the_weights(tmp_path: Path) -> None:
    tensors, config = tensors_of(MODEL), config_of(MODEL)
    for name in ("one", "other"):
        write(tmp_path / name, tensors, config)
        (tmp_path / name / "tokenizer.json").write_text("{}")
        tensors = {name: tensor + 1 for name, tensor in tensors.items()}
    one, other = (Checkpoint.open(tmp_path / name) for name in ("one", "other"))
    assert one.fingerprint != other.fingerprint and one.vocabulary == other.vocabulary
    (tmp_path / "other" / "tokenizer.json").write_text('{"version": "1.0"}')
    assert one.vocabulary != other.vocabulary
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    write_config(tmp_path / "other", config | {"eos_token_id": 5})
    assert one.vocabulary != Checkpoint.open(tmp_path / "other").vocabulary
