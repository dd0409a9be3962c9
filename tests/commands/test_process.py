"""`python -m twotower` as a process of its own."""

import signal
import subprocess
import sys
from functools import partial
from typing import Any

import pytest

import twotower
from tests.commands.running import GOOD


def _process(*arguments: str, **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "twotower", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def test_version_and_help_in_a_process() -> None:
    out, err = _process("--version").communicate(timeout=60)
    assert (out, err) == (f"twotower {twotower.__version__}\n", "")
    out, _ = _process("generate", "--help").communicate(timeout=60)
    assert out.count("python -m twotower generate --checkpoint demo") == 2


@pytest.mark.slow
def test_ctrl_c_in_a_process() -> None:
    """After the first tokens, in the middle of decoding. (What runs in a shell's background inherits deaf ears.)"""
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    long = ("--mode", "ar", "--max-new-tokens", "4000", "--ignore-eos")
    process = _process("generate", *GOOD, *long, bufsize=1, preexec_fn=listens)
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "python -m twotower: error: interrupted\n")
