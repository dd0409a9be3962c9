"""Where traces go: a collector that takes everything and keeps nothing, in a process of its own.

python -m benchmarks.watching_parts.sink     # says its port; one line on stdin: says what came so far
"""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Sink:
    """The process. `port`: on loopback."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.port = int(self._said())

    @property
    def pid(self) -> int:
        return self._process.pid

    def received(self) -> tuple[int, int]:
        """Calls and bytes since it began."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        calls, size = self._said().split()
        return int(calls), int(size)

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@contextmanager
def sink() -> Iterator[Sink]:
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Sink(process)
        finally:
            process.kill()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # the exporter keeps its connection
    calls = size = 0

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        self.rfile.read(length)
        _Handler.calls += 1
        _Handler.size += length
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    for _ in sys.stdin:
        print(_Handler.calls, _Handler.size, flush=True)


if __name__ == "__main__":
    main()
