"""A cell's settings, and the bundles of resources that it asks Ray for."""

import math
import os
from dataclasses import dataclass, field

from twotower.core import Mode
from twotower.device_names import check_dtype, parse_device
from twotower.engine.settings import EngineSettings
from twotower.errors import ConfigError
from twotower.exchange.settings import LinkSettings
from twotower.model.checkpoint import Checkpoint, Layout

PLACEMENTS = ("split", "colocated", "ar_only")
STRATEGY = "STRICT_PACK"
# A CPU cell has to fit on any laptop: Ray's CPUs are only bookkeeping, so each process asks for a sliver.
_REPLICA_CPUS, _TOWER_CPUS = 0.1, 0.1


@dataclass(frozen=True, slots=True)
class CellSettings:
    """A cell. `gpus_per_tower` None: one where the towers run on CUDA, none where they run on the CPU.

    `device` is cpu, cuda or cuda:N, never auto, because it decides bundles and memory before any process is started.
    With cuda:N it is the Nth of the GPUs that a tower process sees. Ray shows a process its own GPUs: one, or
    `gpus_per_tower` if that is more; with 0 the process sees all GPUs of its node. `ssm_wire_dtype`: the dtype of Mamba
    states between towers; only `split` sends any.
    """

    checkpoint: str
    device: str
    dtype: str = "float32"
    placement: str = "split"
    denoisers_per_context: int = 1
    gpus_per_tower: float | None = None
    ssm_wire_dtype: str = "float32"
    engine: EngineSettings = field(default_factory=EngineSettings)

    def __post_init__(self) -> None:
        self._check_device()
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"placement: got {self.placement!r}, wanted one of {', '.join(PLACEMENTS)}")
        if self.denoisers_per_context < 1:
            raise ConfigError(f"denoisers_per_context: got {self.denoisers_per_context}, wanted at least 1")
        if self.placement != "split" and self.ssm_wire_dtype != "float32":
            raise ConfigError(
                f"ssm_wire_dtype: got {self.ssm_wire_dtype!r} with placement {self.placement}, which sends no states"
            )

    def _check_device(self) -> None:
        if parse_device(self.device).kind == "auto":
            raise ConfigError("device: got 'auto', which must be resolved by `resolve_device` before a cell is built")
        if (problem := unseen_device(self.device, self.gpus_per_tower)) is not None:
            raise ConfigError(problem)

    @property
    def link_settings(self) -> LinkSettings:
        """The settings of the towers' links. Raises ConfigError."""
        engine = self.engine
        return LinkSettings(
            link_timeout_s=engine.link_timeout_s,
            stall_timeout_s=engine.stall_timeout_s,
            ssm_wire_dtype=self.ssm_wire_dtype,
        )

    @property
    def processes(self) -> int:
        """Tower processes of one cell."""
        return tower_processes(self.placement, self.denoisers_per_context)

    @property
    def gpus(self) -> float:
        """GPUs of one tower process."""
        if self.gpus_per_tower is not None:
            return self.gpus_per_tower
        return 1.0 if parse_device(self.device).kind == "cuda" else 0.0

    @property
    def cores(self) -> int:
        """One tower process's share of this machine's cores, so that towers do not fight for them."""
        return max(1, len(os.sched_getaffinity(0)) // self.processes)


def tower_processes(placement: str, denoisers_per_context: int) -> int:
    """Tower processes of one cell of this placement."""
    return 1 + denoisers_per_context if placement == "split" else 1


def unseen_device(device: str, gpus_per_tower: float | None) -> str | None:
    """The error of a device whose index is beyond a tower process's GPUs; else None.

    Raises ConfigError for an invalid device name.
    """
    index, given = parse_device(device).index, 1.0 if gpus_per_tower is None else gpus_per_tower
    seen = math.ceil(given)
    if index is None or seen == 0 or index < seen:
        return None
    got = f"device: got {device!r}, but with gpus_per_tower {given:g} a tower process sees {_gpus(seen)}"
    return f"{got}, wanted {'cuda or cuda:0' if seen == 1 else f'cuda:0 to cuda:{seen - 1}'}"


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """The towers' `device`, never auto, and the reason in one line for the operator."""

    device: str
    why: str


def resolve_device(device: str, processes: int, gpus_per_tower: float | None, gpus_of_node: float) -> DeviceChoice:
    """`auto` is CUDA if the largest node's GPUs suffice for a cell, else the CPU. Any other name is kept."""
    if device != "auto":
        return DeviceChoice(device, f"device {device}, as configured")
    wanted = processes * (1.0 if gpus_per_tower is None else gpus_per_tower)
    needs = f"a cell of {processes} tower {'process' if processes == 1 else 'processes'} wants {_gpus(wanted)}"
    chosen = "cuda" if 0 < wanted <= gpus_of_node else "cpu"
    return DeviceChoice(chosen, f"device auto is {chosen}: {needs}, a node has {gpus_of_node:g}")


def _gpus(number: float) -> str:
    return f"{number:g} {'GPU' if number == 1 else 'GPUs'}"


def bundles(settings: CellSettings) -> list[dict[str, float]]:
    """One bundle for the replica itself, then one for each tower process, the context tower's first."""
    tower = {"CPU": _TOWER_CPUS}
    if settings.gpus:
        tower["GPU"] = settings.gpus
    return [{"CPU": _REPLICA_CPUS}, *(dict(tower) for _ in range(settings.processes))]


def check_settings(settings: CellSettings, asked: str | None = None) -> tuple[Mode, ...]:
    """The modes a cell of these settings serves. Raises CheckpointError or ConfigError before anything is started.

    `asked`: the placement in the user's words, if it differs from the settings'.
    """
    check_dtype(settings.dtype)
    checkpoint = Checkpoint.open(settings.checkpoint, settings.engine.expert_format)
    if settings.placement != "ar_only" and checkpoint.layout is not Layout.TWO_TOWER:
        raise ConfigError(
            f"placement: got {(asked or settings.placement)!r} for a {checkpoint.layout} checkpoint, wanted 'ar_only'"
        )
    return (Mode.AR,) if settings.placement == "ar_only" else checkpoint.modes
