"""The names a setting may give a device, and the numbers on it. Pure Python: says what a name means, not what is
there."""

import re
from dataclasses import dataclass
from typing import Literal

from twotower.errors import ConfigError

WANTED = "auto, cpu, cuda or cuda:N"
DTYPES = ("float32", "bfloat16")
_NAME = re.compile(r"(auto|cpu|cuda)|cuda:(0|[1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class DeviceName:
    """`index` counts the GPUs that the process sees; None: not given."""

    kind: Literal["auto", "cpu", "cuda"]
    index: int | None = None


def parse_device(name: str) -> DeviceName:
    """Raises ConfigError for what is no device's name."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"device: got {name!r}, wanted {WANTED}")
    if match[1] is None:
        return DeviceName("cuda", int(match[2]))
    kind: Literal["auto", "cpu", "cuda"] = "auto" if name == "auto" else "cpu" if name == "cpu" else "cuda"
    return DeviceName(kind)


def check_dtype(name: str) -> None:
    """Raises ConfigError for what is no dtype's name."""
    if name not in DTYPES:
        raise ConfigError(f"dtype: got {name!r}, wanted one of {', '.join(DTYPES)}")
