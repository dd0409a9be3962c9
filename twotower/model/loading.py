"""Checkpoint tensors into towers, and towers into checkpoint tensors.

A process that hosts one tower reads only that tower's tensors. Each reader reads one tensor after the other, directly
to its device and dtype. So a process allocates only the tower and one tensor a reader. A reader maps a bounded part of
a file.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from twotower.config import ModelConfig
from twotower.errors import CheckpointError
from twotower.expert_formats import quantised_values
from twotower.model.checkpoint import (
    BASE_PREFIX,
    CONTEXT_PREFIX,
    DENOISER_PREFIX,
    Checkpoint,
    Layout,
)
from twotower.model.kernels import choose, install
from twotower.model.quantised import Packed, quantise
from twotower.model.reading import FLOATS, Plan, Target, planned, read
from twotower.model.tower import ContextTower, DenoiserTower, Tower

# Kept in fp32 in a model of any dtype: they are few, and the scan and the router are sensitive to them.
_KINDS = {torch.int8: ("I8",), torch.uint8: ("U8",)}
_ALWAYS_FP32 = ("A_log", "D", "dt_bias", "gate.weight", "e_score_correction_bias")
_IGNORED_PREFIXES = ("mtp.",)
_DENOISER_OWN = ("lm_head.", "t_embedder.", "t_block.", "scale_shift_tables.")


def load_context_tower(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, progress: bool = False, kernels: str = "auto"
) -> ContextTower:
    """The context tower, ready to read. `kernels` torch forces the plain path (see `model/kernels`).

    Raises CheckpointError naming the first wrong tensor and its file.
    """
    with torch.device("meta"):
        tower = ContextTower(checkpoint.config)
    _load(checkpoint, tower, device, dtype, progress)
    install(tower, choose(checkpoint.config, device, dtype, kernels))
    return tower


def load_denoiser_tower(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, progress: bool = False, kernels: str = "auto"
) -> DenoiserTower:
    """The denoiser tower, ready to step. Raises CheckpointError as above, and for a base checkpoint, which has none."""
    if checkpoint.layout is not Layout.TWO_TOWER:
        raise CheckpointError(f"{checkpoint.directory}: a {checkpoint.layout} checkpoint has no denoiser tower")
    with torch.device("meta"):
        tower = DenoiserTower(checkpoint.config)
    _load(checkpoint, tower, device, dtype, progress)
    install(tower, choose(checkpoint.config, device, dtype, kernels))
    return tower


def save_checkpoint(directory: Path, config: ModelConfig, context: ContextTower, denoiser: DenoiserTower) -> None:
    """Write config.json and model.safetensors in the released layout."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for tower in (context, denoiser):
        for name, tensor in stored_tensors(tower, Layout.TWO_TOWER):
            tensors[name] = tensor.detach().cpu().clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    values = {
        "architectures": ["NemotronHTwoTowerForCausalLM"],
        "model_type": "nemotron_h",
        **asdict(config),
        "num_hidden_layers": config.num_layers,
    }
    del values["experts"]
    if config.experts is not None:
        values |= quantised_values(config.experts)
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def stored_tensors(tower: Tower, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a tower under its name in the files, as a view of the (sometimes fused) parameter."""
    for name, tensor in tower.state_dict(keep_vars=False).items():
        prefix, _, leaf = name.rpartition(".")
        if prefix.endswith("mixer.experts"):
            part, _, kind = leaf.partition("_")
            stored = {"proj": "weight", "scale": "weight_scale"}.get(kind, kind)
            for expert, view in enumerate(tensor):
                yield _file_name(tower, layout, f"{prefix}.{expert}.{part}_proj.{stored}"), view
        elif name == "scale_shift_tables":
            for layer, view in enumerate(tensor):
                yield f"scale_shift_tables.{layer}", view
        else:
            yield _file_name(tower, layout, name), tensor


def _file_name(tower: Tower, layout: Layout, name: str) -> str:
    context = isinstance(tower, ContextTower)
    if name.startswith("head."):
        leaf = name.removeprefix("head.")
        return f"context_lm_head.{leaf}" if context and layout is Layout.TWO_TOWER else f"lm_head.{leaf}"
    if name.startswith("time."):
        return name.removeprefix("time.")
    if not context:
        return DENOISER_PREFIX + name
    return (BASE_PREFIX if layout is Layout.BASE else CONTEXT_PREFIX) + name


def plan_of(checkpoint: Checkpoint, kind: type[ContextTower] | type[DenoiserTower]) -> Plan:
    """The plan for loading a tower of this kind. Reads only headers. Raises CheckpointError naming the first tensor
    that is missing, unexpected, or of another shape or dtype than wanted, and its file.
    """
    with torch.device("meta"):
        tower = kind(checkpoint.config)
    return _planned(checkpoint, tower)


def _planned(checkpoint: Checkpoint, tower: Tower) -> Plan:
    what = "context tower" if isinstance(tower, ContextTower) else "denoiser tower"
    targets = _targets(checkpoint, tower)
    return planned(checkpoint, what, targets, lambda name: _belongs_elsewhere(checkpoint, tower, name))


def _load(checkpoint: Checkpoint, tower: Tower, device: torch.device, dtype: torch.dtype, progress: bool) -> None:
    plan = _planned(checkpoint, tower)
    materialise(tower, device, dtype)
    read(checkpoint, plan, _targets(checkpoint, tower), progress)
    tower.requires_grad_(False).eval()


def _targets(checkpoint: Checkpoint, tower: Tower) -> dict[str, Target]:
    """Targets by the name in the files. If the checkpoint is quantised while it is read, one tensor gives a packed
    matrix and its scales.
    """
    views = dict(stored_tensors(tower, checkpoint.layout))
    targets = {}
    for name, view in views.items():
        scales = views.get(f"{name}_scale")
        if checkpoint.quantises and name.endswith(".weight_scale"):
            continue
        if checkpoint.quantises and scales is not None:
            targets[name] = _to_quantise(checkpoint, Packed(view, scales))
        else:
            targets[name] = Target(tuple(view.shape), _KINDS.get(view.dtype, FLOATS), view.copy_)
    return {_spelling(checkpoint, name): target for name, target in targets.items()}


def _to_quantise(checkpoint: Checkpoint, packed: Packed) -> Target:
    form = checkpoint.config.experts
    assert form is not None
    outputs, groups, nbytes = packed.weights.shape

    def put(tensor: Tensor) -> None:
        made = quantise(tensor.to(packed.weights.device), form)
        packed.weights.copy_(made.weights)
        packed.scales.copy_(made.scales)

    return Target((outputs, groups * nbytes * 8 // form.bits), FLOATS, put)


def _spelling(checkpoint: Checkpoint, name: str) -> str:
    """The name, or its old spelling that some files use."""
    old = name.replace(".embeddings.weight", ".embedding.weight")
    return old if name not in checkpoint.files and old in checkpoint.files else name


def _belongs_elsewhere(checkpoint: Checkpoint, tower: Tower, name: str) -> bool:
    """Whether a tensor that this tower does not read still belongs to the checkpoint."""
    if name.startswith(_IGNORED_PREFIXES):
        return True
    if checkpoint.layout is Layout.BASE:
        return False
    if isinstance(tower, ContextTower):
        return name.startswith((DENOISER_PREFIX, *_DENOISER_OWN))
    return name.startswith((CONTEXT_PREFIX, "context_lm_head."))


def materialise(tower: Tower, device: torch.device, dtype: torch.dtype) -> None:
    """Allocate uninitialised memory for a tower that was built on the meta device."""
    small = {name for name, _ in tower.state_dict().items() if name.endswith(_ALWAYS_FP32)}
    for module_name, module in tower.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for name, parameter in module.named_parameters(recurse=False):
            kind = torch.float32 if prefix + name in small else dtype
            memory = torch.empty(parameter.shape, device=device, dtype=kind)
            setattr(module, name, torch.nn.Parameter(memory, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, device=device, dtype=buffer.dtype))
