"""The settings of a link between two processes: sizes, timeouts, the other end's address, and hooks into its engine.

The context side's settings travel inside the address, so the two ends cannot disagree.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from twotower.errors import ConfigError
from twotower.transport.handshake import Address

DATA_BACKENDS = ("auto", "gloo", "nccl")
SSM_WIRE_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Times in seconds, sizes in bytes.

    `staging_buffers` messages of up to `staging_bytes` may be under way at once. A larger delta makes its buffer grow,
    but `staging.fitted` leaves no delta that is larger. `data_backend` auto: NCCL between two GPUs, gloo otherwise.
    `ssm_wire_dtype` bfloat16 halves the SSM states' bytes and rounds them. int8 and float8_e4m3fn reduce them to little
    more than a quarter, with a scale for each channel of a head (`model/scaled.py`).
    """

    link_timeout_s: float = 10.0
    stall_timeout_s: float = 60.0
    heartbeat_s: float = 1.0
    setup_timeout_s: float = 60.0
    data_backend: str = "auto"
    ssm_wire_dtype: str = "float32"
    staging_buffers: int = 3
    staging_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        _one_of("data_backend", self.data_backend, DATA_BACKENDS)
        _one_of("ssm_wire_dtype", self.ssm_wire_dtype, SSM_WIRE_DTYPES)
        for name in (
            "link_timeout_s",
            "stall_timeout_s",
            "heartbeat_s",
            "setup_timeout_s",
            "staging_buffers",
            "staging_bytes",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, wanted more than 0")

    @property
    def beat_s(self) -> float:
        """Time between heartbeats: several fit into the link's timeout."""
        return min(self.heartbeat_s, self.link_timeout_s / 4)


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """All that the denoiser side needs to connect. It holds a secret: pass it on privately, never log all of it."""

    link: int
    epoch: int
    control: Address
    store_port: int
    settings: LinkSettings

    @property
    def name(self) -> str:
        return f"link {self.link} epoch {self.epoch}"


def _nobody_to_wake() -> None:
    return None


@dataclass(frozen=True, slots=True)
class EngineHooks:
    """A link's hooks into the engine that owns its end. All are called from the link's threads.

    `progress` grows while the engine lives, busy or idle. If it stands still for `stall_timeout_s`, the other side
    takes this side for dead. An unwatched engine gives a clock. `on_activity`: called when `poll` or `receive` has
    work.
    """

    progress: Callable[[], int] = time.monotonic_ns
    on_activity: Callable[[], None] = _nobody_to_wake


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: got {value!r}, wanted one of {', '.join(allowed)}")
