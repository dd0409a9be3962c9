"""One side of a link as a process of its own, for tests: `python -m tests.exchange.other_side context|denoiser`.

The address goes from the context side's standard output to the denoiser side's standard input, pickled, in hex.
"""

import pickle
import subprocess
import sys
import threading
from pathlib import Path

from tests.exchange.scripted import ScriptedContext, new_cache
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.settings import EngineHooks, LinkAddress, LinkSettings

_ROOT = Path(__file__).parents[2]


def start(side: str, settings: LinkSettings) -> "subprocess.Popen[str]":
    """The process; it ends when its standard input does."""
    command = [sys.executable, "-m", "tests.exchange.other_side", side, pickle.dumps(settings).hex()]
    return subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read_address(process: "subprocess.Popen[str]") -> LinkAddress:
    assert process.stdout is not None
    address = pickle.loads(bytes.fromhex(process.stdout.readline()))
    assert isinstance(address, LinkAddress)
    return address


def write_address(process: "subprocess.Popen[str]", address: LinkAddress) -> None:
    assert process.stdin is not None
    process.stdin.write(pickle.dumps(address).hex() + "\n")
    process.stdin.flush()


def _context(settings: LinkSettings) -> None:
    cache, woken = new_cache(), threading.Event()
    port, address = open_port(cache, 0, 0, settings, EngineHooks(on_activity=woken.set))
    print(pickle.dumps(address).hex(), flush=True)
    engine = ScriptedContext(port, cache)
    while port.lost is None:
        engine.tick()
        woken.wait(0.5)
        woken.clear()


def _denoiser() -> None:
    woken = threading.Event()
    address = pickle.loads(bytes.fromhex(sys.stdin.readline()))
    link = connect(address, new_cache(), EngineHooks(on_activity=woken.set))
    while True:
        link.poll()
        link.submit(())
        woken.wait(0.5)
        woken.clear()


if __name__ == "__main__":
    if sys.argv[1] == "context":
        _context(pickle.loads(bytes.fromhex(sys.argv[2])))
    else:
        _denoiser()
