"""Room for Ray's own files is looked at before it starts."""

import os
from pathlib import Path

import pytest

from cluster.ops import ray_room
from cluster.ops.ray_room import check_room, ray_directory
from twotower.errors import ConfigError, Unavailable

MIB = 2**20


@pytest.fixture
def home_of_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    return tmp_path


def _free(disk: int, shared: int) -> None:
    check_room(128 * MIB, lambda path: MIB * (shared if path == ray_room.SHARED_MEMORY else disk))


def test_what_is_enough(home_of_ray: Path) -> None:
    _free(disk=64, shared=128)
    _free(disk=192, shared=0)
    check_room(1)


@pytest.mark.parametrize(
    ("disk", "shared", "words"),
    [
        (0, 128, "0 MiB free, wanted 64 MiB for Ray's logs; make room"),
        (63, 128, "63 MiB free, wanted 64 MiB for Ray's logs; make room, or set RAY_TMPDIR to a directory that has it"),
        (
            191,
            64,
            "191 MiB free, wanted 64 MiB for Ray's logs and 128 MiB for its object store (/dev/shm has 64 MiB free)",
        ),
    ],
)
def test_what_is_too_little_is_said_in_numbers(home_of_ray: Path, disk: int, shared: int, words: str) -> None:
    with pytest.raises(Unavailable) as caught:
        _free(disk, shared)
    assert str(caught.value).startswith(f"{home_of_ray}/ray: {words}")


def test_rays_own_rule_for_its_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._common.utils import get_default_ray_temp_dir

    for variables in ({}, {"TMPDIR": "/var/tmp"}, {"TMPDIR": "/var/tmp", "RAY_TMPDIR": "/elsewhere"}):
        for name in ("TMPDIR", "RAY_TMPDIR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert str(ray_directory()) == get_default_ray_temp_dir()


def test_a_directory_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="file/ray: Ray cannot write its logs there; set RAY_TMPDIR"):
        check_room(1)
    if os.getuid() != 0:
        tmp_path.chmod(0o500)
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "none"))
        with pytest.raises(ConfigError, match="Ray cannot write"):
            check_room(1)
