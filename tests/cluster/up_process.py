"""A running `python -m cluster up` for tests: its process, everything it says, and everything it has started."""

import json
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.goldens import VENDORED

CHECKOUT = Path(__file__).resolve().parents[2]
GOLDEN = f"model.checkpoint={(VENDORED / 'tt_moe').resolve()}"
START_S, STOP_S = 120, 30
_SOONER = "cell.capture=off"  # a tower that starts records passes for seconds


class UpProcess:
    """`up` on these ports with these settings, and the golden checkpoint where they name none. Records no passes."""

    def __init__(
        self,
        http: int,
        grpc: int,
        *settings: str,
        flags: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        cwd: Path = CHECKOUT,
    ) -> None:
        self.http, self.grpc = http, grpc
        self.trust: ssl.SSLContext | None = None  # where HTTP speaks TLS
        command = [sys.executable, "-m", "cluster", "up", *flags]
        for setting in (GOLDEN, _SOONER, f"ingress.http_port={http}", f"ingress.grpc_port={grpc}", *settings):
            command += ["--set", setting]
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def wait_until_it_says(self, words: str, within_s: float = START_S) -> None:
        deadline = time.monotonic() + within_s
        while words not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.1)

    def wait_until_ready(self) -> None:
        self.wait_until_it_says("Ctrl-C stops it")

    def processes(self) -> list[psutil.Process]:
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def ask(self, **fields: Any) -> dict[str, Any]:
        """The answer to a completion over HTTP."""
        body = {"prompt": [1, 5, 9], "max_tokens": 20, "ignore_eos": True} | fields
        url = f"{'http' if self.trust is None else 'https'}://127.0.0.1:{self.http}/v1/completions"
        request = urllib.request.Request(url, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60, context=self.trust) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def ended(self, within_s: float = STOP_S) -> int:
        """Its exit code; it is killed if it does not end by itself."""
        try:
            return self.process.wait(within_s)
        finally:
            self.process.kill()
            self._reader.join(5)
            assert self.process.stdout is not None
            self.process.stdout.close()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.ended()


def first_of(*both: UpProcess) -> tuple[UpProcess, UpProcess]:
    """Two started together: the one that stays, and the one that has ended."""
    deadline = time.monotonic() + START_S
    while True:
        ended = [up for up in both if up.process.poll() is not None]
        if ended:
            [running] = [up for up in both if up not in ended]
            return running, ended[0]
        assert time.monotonic() < deadline, "\n".join(up.said for up in both)
        time.sleep(0.1)
