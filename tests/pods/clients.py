"""The test's end of the clients' process: where they ask, and what has come of it."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.pods.network import inside

_END_S = 60.0
_FEW, _REST_S = 2, 0.5  # clients that ask while the cores have other work, and their rest after each answer


@dataclass(slots=True)
class Request:
    """`outcome` is empty while it runs; then right, near tie, changed or failed, and how. `streams`: it has tokens."""

    host: str
    what: str
    streams: bool = False
    outcome: str = ""
    took_s: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.outcome in ("right", "near tie")


class Clients:
    """So many, each with one request at a time, in this namespace."""

    def __init__(self, space: str, number: int, directory: Path, environment: Mapping[str, str]) -> None:
        self._number, self._log = number, directory / "clients.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                inside(space, [sys.executable, "-m", "tests.pods.load", str(number)]),
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._requests: dict[str, Request] = {}
        self._changed = threading.Condition()
        self.have_questions = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            with self._changed:
                if "questions" in told:
                    self.have_questions = True
                elif "what" in told:
                    self._requests[told["label"]] = Request(told["host"], told["what"])
                elif "streams" in told:
                    self._requests[told["label"]].streams = True
                else:
                    request = self._requests[told["label"]]
                    request.outcome, request.took_s = told["outcome"], told["took_s"]
                self._changed.notify_all()

    def ask(self, *hosts: str, easy: bool = False, long: bool = False) -> None:
        """From now on each new request goes to one of these; without hosts nobody asks. `easy`: a few, for processes
        start that need the cores too. `long`: only streams, each of which takes seconds."""
        assert self._process.stdin is not None
        most, pause_s = (_FEW, _REST_S) if easy else (self._number, 0.0)
        told = {"hosts": hosts, "most": most, "pause_s": pause_s, "long": long}
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()

    def requests(self, host: str | None = None) -> list[Request]:
        with self._changed:
            return [request for request in self._requests.values() if host in (None, request.host)]

    def under_way(self, host: str | None = None) -> int:
        return sum(not request.outcome for request in self.requests(host))

    def answered(self, host: str | None = None) -> int:
        return sum(bool(request.outcome) for request in self.requests(host))

    def wait_for_more(self, answers: int, within_s: float, hosts: Sequence[str | None] = (None,)) -> None:
        """Until each of these hosts has ended so many more requests."""
        before = {host: self.answered(host) for host in hosts}
        self._wait(lambda: all(self.answered(host) >= before[host] + answers for host in hosts), within_s)

    def wait_for_long_streams(self, number: int, within_s: float) -> None:
        """Until so many stream at once."""

        def streaming() -> int:
            return sum("long" in r.what and r.streams and not r.outcome for r in self.requests())

        self._wait(lambda: streaming() >= number, within_s)

    def wait_until_idle(self, within_s: float, host: str | None = None) -> None:
        self._wait(lambda: not self.under_way(host), within_s)

    def wait_for_questions(self, within_s: float) -> None:
        self._wait(lambda: self.have_questions, within_s)

    def _wait(self, done: Callable[[], bool], within_s: float) -> None:
        deadline = time.monotonic() + within_s
        with self._changed:
            while not done():
                assert self._process.poll() is None, f"the clients have ended: {self._log.read_text()[-3000:]}"
                assert time.monotonic() < deadline, f"nothing moves: {self.summary()}"
                self._changed.wait(0.2)

    def summary(self) -> str:
        requests = self.requests()
        counted = Counter((request.host, request.outcome or "under way") for request in requests)
        told = [f"{number} {outcome} ({host})" for (host, outcome), number in sorted(counted.items())]
        return "; ".join([*told, f"the slowest took {max((request.took_s for request in requests), default=0):g} s"])

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            self._process.stdout.close()
