"""How commands end: one line for whatever goes wrong, a traceback only where it was asked for."""

import os
import subprocess
import sys
from argparse import Namespace
from typing import NoReturn

import pytest

from cluster.cli.main import main as cluster_main
from twotower.commands import main
from twotower.commands.ending import ended
from twotower.commands.parser import Parser
from twotower.errors import CheckpointError, ConfigError, InvalidRequest, TwoTowerError, Unavailable


def _raising(error: BaseException, *flags: str) -> int:
    def run(options: Namespace) -> NoReturn:
        raise error

    return ended(run, Parser("tower").parse_args(flags), "tower: ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest.of("prompt", "got none"), 2),
        (CheckpointError("no weights"), 2),
        (ConfigError("a typo"), 2),
        (Unavailable("gone"), 1),
        (TwoTowerError("two\n  lines"), 1),
    ],
)
def test_what_we_raise_is_one_line(error: TwoTowerError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ((), ("--verbose",)):
        assert _raising(error, *flags) == code
        assert capsys.readouterr() == ("", f"tower: error: {' '.join(str(error).split())}\n")


def test_the_unexpected_is_one_line_and_with_verbose_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert _raising(ZeroDivisionError("by\nzero")) == 1
    line = "tower: error: unexpected ZeroDivisionError: by zero"
    assert capsys.readouterr().err == f"{line} (--verbose shows where)\n"
    assert _raising(ZeroDivisionError("by\nzero"), "--verbose") == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and "in run\n" in told and told.endswith(f"\n{line}\n")


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    assert _raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "tower: error: interrupted\n"


@pytest.mark.parametrize("flags", [("--verbose", "plan"), ("plan", "--verbose")])
def test_the_flag_may_stand_before_the_command_or_after(
    flags: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(options: Namespace) -> NoReturn:
        raise RuntimeError("nobody expected this")

    monkeypatch.setattr("twotower.commands.plan.plan", broken)
    checkpoint = ("--checkpoint", "demo", "--device", "h100")
    assert main([*flags, *checkpoint]) == 1
    assert "in broken\n" in capsys.readouterr().err
    assert main(["plan", *checkpoint]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_every_command_takes_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [(main, name) for name in ("generate", "bench", "plan", "quantize")]
    commands += [(cluster_main, name) for name in ("up", "status", "down", "generate", "key", "tune")]
    for command, name in commands:
        with pytest.raises(SystemExit):
            command([name, "--help"])
        assert "--verbose" in capsys.readouterr().out, name


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="wants Linux's /dev/full")
def test_output_that_nobody_takes_is_a_failure() -> None:
    """Also where it waits in a buffer until the end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "cluster", "key", "team-a"]
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    told, last = ended.stderr.splitlines()  # the first is the key's own
    assert ended.returncode == 1 and "the key of team-a" in told and "No space left" in last
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert ended.returncode == 1 and "rror" not in ended.stderr and "ignored" not in ended.stderr
