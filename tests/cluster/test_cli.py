"""The command line: what it refuses, and how a request is made of its arguments."""

import os
import socket
from pathlib import Path

import pytest

from cluster import run_state
from cluster.cli import main
from cluster.deployment import reason
from cluster.generate_arguments import add_generate_arguments, request_of
from cluster.run_state import RunState
from twotower.pb.twotower.v1 import generation_pb2 as pb


@pytest.fixture(autouse=True)
def own_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["up", "--set", "cell.placment=split"], 2, "did you mean placement?"),
        (["up", "--config", "/no/such.yaml"], 2, "no such file"),
        (["up", "--set", "model.checkpoint=/no/such"], 1, "/no/such: no such directory"),
        (["status"], 2, "no service of yours is running"),
        (["down", "--http-port", "1"], 2, "no service of yours listens on HTTP port 1"),
        (["generate", "--prompt-token-ids", "5,x"], 2, "wanted ids such as 5,9,11"),
        (["generate", "--prompt-token-ids", "-5"], 2, "arguments"),
        (["generate", "--prompt", "a", "--address", "127.0.0.1:1"], 1, "no service answers on 127.0.0.1:1"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Path(__file__).parents[1] / "golden" / "tt_moe"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        arguments = ["--set", f"model.checkpoint={checkpoint}", "--set", f"ingress.http_port={port}"]
        assert main(["up", *arguments]) == 1
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}: Address already in use; choose another" in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["up", "--help"], ["generate", "--help"], ["status", "--help"]])
def test_help_teaches(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0 and "usage: python -m cluster" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["serve"], ["up", "--colour"], ["generate"], ["generate", "--seed", "x"]])
def test_unknown_words_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_only_what_was_given_is_sent() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_generate_arguments(parser)
    bare = request_of(parser.parse_args(["--prompt", "a"]))
    assert bare == pb.GenerateRequest(text="a", params=pb.DecodingParams())
    full = request_of(
        parser.parse_args(
            "--prompt-token-ids 5,6 --mode mock_ar --max-new-tokens 3 --top-p .5 --seed 0 --stop x --ignore-eos".split()
        )
    )
    params = pb.DecodingParams(mode=pb.MODE_MOCK_AR, max_new_tokens=3, top_p=0.5, seed=0, ignore_eos=True)
    assert full == pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6]), params=params, stop=["x"])


def test_notes_of_dead_services_are_cleared_away() -> None:
    run_state.write(8000, RunState(os.getpid(), 1.0, "127.0.0.1:8000", "127.0.0.1:50051", "demo"))
    assert run_state.running() == {}
    assert not run_state.file_of(8000).exists()


def test_down_does_not_signal_a_reused_pid(capsys: pytest.CaptureFixture[str]) -> None:
    run_state.write(8000, RunState(os.getpid(), 1.0, "127.0.0.1:8000", "127.0.0.1:50051", "demo"))
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
