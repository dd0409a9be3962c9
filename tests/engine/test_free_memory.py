"""What is free is measured, and what will not fit is refused before anything is loaded, with the sum."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cuda_stand_in import gpus
from tests.goldens import CPU, GOLDEN_DIR, MODELS
from twotower.engine import free_memory, in_process
from twotower.engine.free_memory import MARGINS, check_fits, free_bytes, free_host_bytes
from twotower.engine.in_process import open_pair
from twotower.engine.memory import Memory, together
from twotower.engine.settings import EngineSettings
from twotower.errors import ConfigError

GIB = 2**30
NEEDS = Memory(32, 4096, 3 * GIB, GIB, 2 * GIB, GIB // 2, 0, passing=GIB)


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       16384000 kB\nMemFree:  10 kB\nMemAvailable:    8000000 kB\n"}
V2, GROUP = "sys/fs/cgroup", "sys/fs/cgroup/pods/pod1"
STAT = "anon 100\nactive_file 300\ninactive_file 700\nslab 9\n"
CASES: dict[str, tuple[dict[str, str], int | None]] = {
    "no container": (MEMINFO, 8_000_000 * 1024),
    "nothing is said": ({}, None),
    "a container that sees itself as the top": (
        MEMINFO
        | {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "5000\n", f"{V2}/memory.current": "2000\n"}
        | {f"{V2}/memory.stat": STAT},
        5000 - 2000 + 300 + 700,
    ),
    "no limit of its own, a limit above": (
        MEMINFO
        | {"proc/self/cgroup": "0::/pods/pod1\n", f"{GROUP}/memory.max": "max\n", f"{GROUP}/memory.current": "7\n"}
        | {f"{V2}/pods/memory.max": "9000\n", f"{V2}/pods/memory.current": "1000\n"},
        8000,
    ),
    "over its limit": (
        MEMINFO | {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "5000\n", f"{V2}/memory.current": "6000\n"},
        0,
    ),
    "the first kind of cgroup, its path not visible": (
        MEMINFO
        | {"proc/self/cgroup": "12:cpu,cpuacct:/a\n5:memory:/docker/af\n0::/x\n"}
        | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "4000\n", "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500"}
        | {"sys/fs/cgroup/memory/memory.stat": "inactive_file 5\ntotal_inactive_file 400\ntotal_active_file 100\n"},
        4000 - 1500 + 500,
    ),
    "the first kind, unlimited": (
        MEMINFO
        | {"proc/self/cgroup": "5:memory:/\n"}
        | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
        | {"sys/fs/cgroup/memory/memory.usage_in_bytes": "1500"},
        8_000_000 * 1024,
    ),
}


@pytest.mark.parametrize(("files", "free"), CASES.values(), ids=CASES.keys())
def test_what_the_host_has(tmp_path: Path, files: dict[str, str], free: int | None) -> None:
    assert free_host_bytes(_write(tmp_path, files)) == free


def test_what_is_pinned_has_to_fit_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "free_host_bytes", lambda: 3 * GIB)
    with gpus(1, monkeypatch):
        check_fits(replace(NEEDS, host=3 * GIB - MARGINS["cpu"]), torch.device("cuda", 0))
        with pytest.raises(
            ConfigError, match=r"prefix_cache_in: host, got 3.00 GiB free there, wanted 4.06 GiB \(pinned"
        ):
            check_fits(replace(NEEDS, host=4 * GIB), torch.device("cuda", 0))


def test_this_host_says() -> None:
    free = free_bytes(CPU)
    assert free is not None and free > 2**20


def test_a_gpu_says_too_and_what_torch_holds_unused_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with gpus(2, monkeypatch) as machine:
        machine.free[1] = 5 * GIB
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
        assert free_bytes(torch.device("cuda", 1)) == 7 * GIB


@pytest.mark.parametrize("device", [CPU, torch.device("cuda", 1)])
def test_the_sum_decides(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    enough = int(7.5 * GIB) + MARGINS[device.type]
    monkeypatch.setattr(free_memory, "free_bytes", lambda _: enough)
    check_fits(NEEDS, device)
    monkeypatch.setattr(free_memory, "free_bytes", lambda _: enough - 1)
    with pytest.raises(ConfigError) as caught:
        check_fits(NEEDS, device)
    said = str(caught.value)
    assert "\n" not in said
    for words in (
        f"got {enough / GIB:.2f} GiB free on {device}, wanted {enough / GIB:.2f} GiB = ",
        "weights 3.00 + slots 1.00 + pages 2.00 + staging 0.50 + scratch 0.00 + prefixes 0.00 + passing 1.00 + margin ",
        "max_sequences, max_sequence_length, cache_tokens, dtype (bfloat16), placement (split) or device",
    ):
        assert words in said


def test_where_nobody_says_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "free_bytes", lambda _: None)
    check_fits(NEEDS, CPU)


def test_processes_that_share_a_memory_are_added_up() -> None:
    both = together([NEEDS, NEEDS])
    assert (both.total, both.passing) == (2 * NEEDS.total, 2 * NEEDS.passing)


async def test_a_pair_that_does_not_fit_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both towers and their one cache in one sum."""
    monkeypatch.setattr(in_process, "load_context_tower", lambda *_: pytest.fail("weights were read"))
    settings = EngineSettings(max_sequences=4, max_sequence_length=128)
    with gpus(1, monkeypatch) as machine:
        machine.free[0] = GIB // 4
        with pytest.raises(ConfigError, match=re.escape("got 0.25 GiB free on cuda:0, wanted 0.7")):
            async with open_pair(GOLDEN_DIR / MODELS[0], settings, "cuda"):
                pytest.fail("it ran")
