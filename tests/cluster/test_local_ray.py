"""What a Ray of our own is told before it starts."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import pytest

from benchmarks.reference.service import free_port
from cluster.cli.main import main
from cluster.no_proxies import bypass_proxies
from cluster.ops import local_ray, run_state
from tests.cluster.fakes import ScriptedCells, generation, grpc_server
from twotower.errors import ConfigError
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `ray.init` was called with, and the token that it would have found."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.init", lambda **options: calls.append({**options, "token": os.environ.get(AUTH[1])}))
    return calls


def test_a_token_is_drawn_where_none_is_given(started: list[dict[str, Any]]) -> None:
    for name in AUTH:
        os.environ.pop(name, None)
    local_ray.start_ray()
    assert len(started[0]["token"]) == 64 and started[0]["address"] == "local"


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN_PATH", "/some/file")])
def test_what_the_user_says_of_tokens_stays(name: str, value: str, started: list[dict[str, Any]]) -> None:
    for other in AUTH:
        os.environ.pop(other, None)
    os.environ[name] = value
    local_ray.start_ray()
    assert started[0]["token"] is None and os.environ[name] == value


@pytest.mark.parametrize("while_it_starts", [True, False])
def test_a_session_is_told_as_soon_as_it_is_there(while_it_starts: bool, tmp_path: Path) -> None:
    """An older one of a process of the same number is not meant, nor is another process's."""
    os.environ["RAY_TMPDIR"] = str(tmp_path)
    earlier, ours = (tmp_path / "ray" / f"session_2026-0{month}-01_{os.getpid()}" for month in (1, 2))
    earlier.mkdir(parents=True)
    told, heard = list[str](), threading.Event()

    def tell(session: str) -> None:
        told.append(session)
        heard.set()

    with contextlib.suppress(KeyboardInterrupt), local_ray.session_told(tell):
        (tmp_path / "ray" / f"session_2026-02-01_1{os.getpid()}").mkdir()
        ours.mkdir()
        if while_it_starts:
            assert heard.wait(10)
        raise KeyboardInterrupt
    assert told == [str(ours)]


def test_another_ray_has_its_own_token(started: list[dict[str, Any]]) -> None:
    for name in AUTH:
        os.environ.pop(name, None)
    local_ray.start_ray("auto")
    assert started[0]["token"] is None


def test_a_full_disk_is_told_before_ray_starts(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("cluster.ops.ray_room._free_bytes", lambda path: 5 * 2**20)
    ports = ["--set", f"ingress.http_port={free_port()}", "--set", f"ingress.grpc_port={free_port()}"]
    assert main(["up", *ports]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "5 MiB free, wanted 64 MiB for Ray's logs" in said and not started


def test_a_process_that_may_use_some_cores_says_so(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 4})
    local_ray.start_ray()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    local_ray.start_ray()
    assert [call["num_cpus"] for call in started] == [2, None]


async def test_grpc_goes_past_every_proxy(cells: ScriptedCells) -> None:
    """As Serve makes its channels, with no option of ours; to an address that no list of exceptions has."""
    for name in ("no_proxy", "no_grpc_proxy"):
        os.environ.pop(name, None)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        os.environ[name] = "http://127.0.0.1:9"

    async def asked() -> str:
        async with grpc_server(generation(cells)) as (address, _), grpc.aio.insecure_channel(address) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            name: str = (await stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=3)).model_name
            return name

    with pytest.raises(grpc.aio.AioRpcError):
        await asked()
    bypass_proxies()
    assert await asked() == "fake"


def test_a_directory_of_notes_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"file/twotower: cannot be made \(.*\); set XDG_RUNTIME_DIR to a directory"):
        run_state.directory()
