"""The command line: what it refuses, and what it makes of a service that is not there or not ready."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.reference.service import free_port
from cluster.cli import asking
from cluster.cli.main import main
from cluster.cli.up import Up, _what_next
from cluster.config import load_config
from cluster.ops import run_state
from cluster.ops.deployment import Progress, choice, failure_of, progress, reason, shortage
from cluster.ops.run_state import RunState
from tests.cluster.fakes import ScriptedCells, generation, grpc_server, tokens
from tests.model.checkpoints import SINGLE, base_tensors, config_of, tensors_of, write
from twotower.errors import ConfigError, Unavailable

SERVED = {"diffusion": False, "mock_ar": False, "ar": True}


@pytest.fixture(autouse=True)
def own_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["up", "--set", "cell.placment=split"], 2, "did you mean placement?"),
        (["up", "--config", "/no/such.yaml"], 2, "no such file"),
        (["up", "--set", "model.checkpoint=/no/such"], 2, "model.checkpoint: /no/such: no such directory"),
        (["up", "--set", "cell.placement=ar_only", "--set", "decode.mode=diffusion"], 2, "decode.mode: got diffusion"),
        (["status"], 2, "no service of yours is running"),
        (["down", "--http-port", "1"], 2, "no service of yours listens on HTTP port 1"),
        (["up", "--set", "ingress.host=no.such.invalid"], 2, "ingress.host: got 'no.such.invalid', wanted an address"),
        (["up", "--set", "ingress.host=192.0.2.77"], 2, "ingress.host: got '192.0.2.77', wanted an address"),
        (["up", "--replace"], 2, "--replace: wanted --address too"),
        (["up", "--address", "127.0.0.1:1"], 1, "no Ray answers on 127.0.0.1:1"),
        (["up", "--address", "[::1]:99999"], 1, "no Ray answers on [::1]:99999"),
        (["generate", "--prompt", "a", "--address", "127.0.0.1:1"], 1, "no service answers on 127.0.0.1:1"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_line(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[0] == "up":
        arguments = [
            *arguments,
            "--set",
            f"ingress.http_port={free_port()}",
            "--set",
            f"ingress.grpc_port={free_port()}",
        ]
    assert main(arguments) == code
    *progress, error = capsys.readouterr().err.splitlines()
    assert words in error and error.startswith("error: ") and all(line.startswith("[") for line in progress)


def test_a_checkpoint_that_the_placement_cannot_serve_is_found_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("cluster.ops.local_ray.start_ray", never)
    tensors, config = base_tensors(tensors_of("tt_moe")), config_of("tt_moe")
    base, damaged = write(tmp_path / "base", tensors, config), write(tmp_path / "damaged", tensors, config)
    (damaged / SINGLE).write_bytes(b"nothing")
    for directory, words in (
        (base, "placement: got 'auto' for a single-tower base checkpoint, wanted 'ar_only'"),
        (damaged, f"model.checkpoint: {damaged / SINGLE}: not a whole safetensors file"),
    ):
        ports = ["--set", f"ingress.http_port={free_port()}", "--set", f"ingress.grpc_port={free_port()}"]
        assert main(["up", "--set", f"model.checkpoint={directory}", *ports]) == 2
        error = capsys.readouterr().err
        assert f"error: {words}" in error and error.count("\n") == 1


@pytest.fixture
def ready_service() -> Iterator[str]:
    """An HTTP server that says yes to everything."""

    class Yes(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"status": "ready", "modes": SERVED}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Yes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


async def test_proxies_of_the_environment_are_not_asked(
    ready_service: str, cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert asking.is_ready(ready_service) and asking.served(ready_service) == SERVED
    async with grpc_server(generation(cells)) as (address, _):
        info = await asyncio.to_thread(asking.model_info, address)
        code = await asyncio.to_thread(main, ["generate", "--prompt", "a", "--address", address, "--timeout", "5"])
    assert (info.name, code) == ("fake", 0)
    assert "All good things" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("with_tokenizer", "prompt", "printed"),
    [
        (True, ["--prompt", "a", "--stop", "All good ideas"], "All good things come to those who wait.\n"),
        (False, ["--prompt-token-ids", "5"], "".join(f"{token} " for token in tokens("All good things"))),
    ],
)
async def test_token_ids_are_shown_only_where_there_is_no_text(
    with_tokenizer: bool, prompt: list[str], printed: str, cells: ScriptedCells, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stop string holds back the text of the first blocks, whose tokens are there."""
    async with grpc_server(generation(cells, with_tokenizer)) as (address, _):
        code = await asyncio.to_thread(main, ["generate", *prompt, "--address", address, "--timeout", "5"])
    assert code == 0 and capsys.readouterr().out.startswith(printed)


async def test_status_says_what_is_served_now(
    ready_service: str, cells: ScriptedCells, capsys: pytest.CaptureFixture[str]
) -> None:
    async with grpc_server(generation(cells)) as (address, _):
        state = RunState(os.getpid(), run_state.start_tick(os.getpid()), ready_service, address, "demo")
        run_state.write(8000, state)
        assert await asyncio.to_thread(main, ["status"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in said if line.startswith(("ready", "modes"))] == [
        ["ready", "yes"],
        ["modes", "diffusion (not now), mock_ar (not now), ar"],
    ]


def test_something_else_on_the_port_is_not_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def talk() -> None:
            with listening.accept()[0] as other:
                other.sendall(b"SSH-2.0-something\r\n")

        threading.Thread(target=talk, daemon=True).start()
        assert not asking.is_ready(f"127.0.0.1:{listening.getsockname()[1]}")


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_the_default_cell_fits_whatever_is_there(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "Resources": {"CPU": 2.0, "GPU": float(gpus)} if gpus else {"CPU": 2.0}}
    gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr("ray.nodes", lambda: [gone, node])
    config = load_config(None)
    chosen = choice(config).config.cell
    assert (chosen.placement, chosen.device) == (("colocated", "cpu"), ("colocated", "cuda"), ("split", "cuda"))[gpus]
    assert shortage(config) is None


class Starting(Up):
    """An `up` whose towers never come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, address: str | None = None) -> None:
        super().__init__(load_config(None, ["cell.start_timeout_s=0.1"]), address, False)
        monkeypatch.setattr("cluster.cli.up._START_SLACK_S", 0.1)
        monkeypatch.setattr("cluster.cli.up._SILENCE_S", 0.0)
        monkeypatch.setattr("cluster.ops.deployment.progress", lambda mark: Progress(1, 0))
        monkeypatch.setattr("cluster.ops.deployment.shortage", lambda config: "1 cell wants 2 GPUs where Ray has 0")


def test_waiting_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "not ready within 0.2 s: 1 of 1 routers and 0 of 1 cells running; 1 cell wants 2 GPUs where Ray has 0"
    with pytest.raises(Unavailable, match=words):
        Starting(monkeypatch)._wait_until_ready()


def test_ours_must_fit_another_ray_may_grow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="wants 2 GPUs where Ray has 0; wanted cells that fit"):
        Starting(monkeypatch)._check_room()
    Starting(monkeypatch, "10.0.0.1:6379")._check_room()
    assert "waiting for the cluster to grow: 1 cell wants 2 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("executable", "typed"),
    [
        (".venv/bin/python", ".venv/bin/python"),
        ("my env/bin/python", "'my env/bin/python'"),
        ("../other/bin/python", "{parent}/other/bin/python"),
    ],
)
def test_what_to_type_next_names_a_python_that_works(
    executable: str, typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(tmp_path / executable))
    state = RunState(1, 1, "127.0.0.1:8000", "127.0.0.1:50051", "demo")
    said = _what_next(state, "words: 2009\n", ["127.0.0.2:4711"], keys=False)
    assert f"\n  {typed.format(parent=tmp_path.parent)} -m cluster generate --prompt $'words: 2009\\n'\n" in said
    assert said.endswith("\n\nMetrics for Prometheus: http://127.0.0.2:4711/metrics\nCtrl-C stops it.")


@pytest.mark.parametrize("behaves", ["fails", "hangs"])
def test_a_dead_controller_is_told_in_bounded_time(behaves: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def ask(mark: bytes | None) -> Progress:
        if behaves == "hangs":
            ended.wait()
        raise RuntimeError("the actor\ndied")

    monkeypatch.setattr("cluster.ops.deployment._ANSWER_S", 0.1)
    monkeypatch.setattr("cluster.ops.deployment._progress", ask)
    words = {"fails": "Serve does not work: RuntimeError: the actor died", "hangs": "Serve has not answered for 0.1 s"}
    with pytest.raises(Unavailable, match=words[behaves]):
        progress()
    ended.set()


def test_rays_own_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    def fail(**_: object) -> None:
        raise RuntimeError("Version mismatch:\n  The cluster was started with\n  Ray: 1.0")

    monkeypatch.setattr(ray, "init", fail)
    ports = ["--set", f"ingress.http_port={free_port()}", "--set", f"ingress.grpc_port={free_port()}"]
    assert main(["up", "--address", "auto", *ports]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: the Ray at auto does not work: RuntimeError: Version mismatch: The cluster was" in error


@pytest.mark.parametrize("arguments", [["--help"], ["up", "--help"], ["generate", "--help"], ["status", "--help"]])
def test_help_teaches(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0 and "usage: python -m cluster" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["serve"], ["up", "--colour"], ["generate"]])
def test_unknown_words_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("python -m cluster") and error.count("\n") == 1


def test_dead_services_do_not_run() -> None:
    state = RunState(os.getpid(), 1, "127.0.0.1:8000", "127.0.0.1:50051", "demo")
    run_state.write(8000, state)
    assert run_state.running() == {} and run_state.killed() == {8000: state}


def test_a_clock_that_was_set_hides_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of the clock are the boot's, which moves with it, and a process's own since then."""
    state = Up(load_config(None, []), None, False)._state
    run_state.write(8000, state)
    then = psutil.Process().create_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1_000_000.0)
    assert psutil.Process().create_time() != then
    assert run_state.running() == {8000: state} and run_state.killed() == {}


# Ends by itself some time after the first signal, at once after the second. Says how many it has heard.
STOPPING = """
import signal, sys, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
print("listening", flush=True)
end = time.monotonic() + 60
while len(heard) < 2 and time.monotonic() < end:
    if heard and end - time.monotonic() > float(sys.argv[1]):
        end = time.monotonic() + float(sys.argv[1])
    time.sleep(0.01)
print(len(heard), flush=True)
"""


@contextmanager
def stopping(after_s: float, **fields: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that has left a note, as an `up` whose requests run for so long."""
    command = [sys.executable, "-c", STOPPING, str(after_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "listening\n"
        started = run_state.start_tick(process.pid)
        run_state.write(8000, RunState(process.pid, started, "127.0.0.1:8000", "127.0.0.1:50051", "demo", **fields))
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_down_waits_for_as_long_as_requests_may_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cluster.cli.main._AT_ONCE_S", 0.1)
    monkeypatch.setattr("cluster.cli.main._END_S", 0.1)
    with stopping(0.7, drain_timeout_s=45.5) as process:
        assert main(["down"]) == 0
        assert process.stdout is not None and process.stdout.read() == "1\n"
    said = capsys.readouterr()
    assert said.err == "waiting for the running requests, for 45.5 s at most; Ctrl-C ends them now\n"
    assert "stopped the service on http://127.0.0.1:8000" in said.out


def test_an_interrupted_down_is_the_second_signal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits, interrupted = RunState.ends_within, list[float]()

    def wait(state: RunState, seconds: float) -> bool:
        if seconds > 600:
            interrupted.append(seconds)
            raise KeyboardInterrupt
        return waits(state, seconds)

    monkeypatch.setattr("cluster.cli.main._AT_ONCE_S", 0.1)
    monkeypatch.setattr(RunState, "ends_within", wait)
    with stopping(50.0, drain_timeout_s=600.0) as process:
        assert main(["down"]) == 0 and interrupted == [660.0]
        assert process.stdout is not None and process.stdout.read() == "2\n"
    assert "ending the running requests now" in capsys.readouterr().err


def test_a_note_of_an_older_version_is_understood() -> None:
    fields = {"pid": os.getpid(), "started": run_state.start_tick(os.getpid()), "http": "a", "grpc": "b", "model": "c"}
    run_state.file_of(8000).write_text(json.dumps(fields | {"cells": 1}))
    assert run_state.running()[8000].drain_timeout_s == 600.0


def test_a_note_that_another_has_replaced_stays() -> None:
    run_state.write(8000, RunState(os.getpid(), run_state.start_tick(os.getpid()), "a", "b", "demo"))
    run_state.remove(8000, os.getpid() + 1)
    assert 8000 in run_state.running()
    run_state.remove(8000, os.getpid())
    assert not run_state.running()


def test_down_does_not_signal_a_reused_pid(capsys: pytest.CaptureFixture[str]) -> None:
    run_state.write(8000, RunState(os.getpid(), 1, "127.0.0.1:8000", "127.0.0.1:50051", "demo"))
    assert main(["down"]) == 2
    assert "no service of yours is running" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "The deployment failed to start 1 times in a row. Traceback (most recent call last):\n  File x\n"
            "ray.exceptions.RayTaskError(CheckpointError): ray::X() (pid=1)\n"
            "twotower.errors.CheckpointError: /c/model.safetensors: not a whole file\n",
            "/c/model.safetensors: not a whole file",
        ),
        ("Traceback\n  File x\nRuntimeError: out of luck\n", "RuntimeError: out of luck"),
        ("something\nelse\n", "else"),
        ("", "no reason given"),
    ],
)
def test_a_failed_deployment_has_one_reason(message: str, line: str) -> None:
    assert reason(message) == line
    assert type(failure_of(message)) is (ConfigError if "CheckpointError" in message else Unavailable)
