"""The bench's end of the clients' process: where they ask, and what has come of it."""

import itertools
import json
import math
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos_parts.client import BY_OTHER
from benchmarks.pods_parts.network import inside
from benchmarks.pods_parts.secrets import SERVICE

_END_S = 60.0
_FEW, _REST_S = 2, 0.5  # clients that ask while the cores have other work, and their rest after each answer


class Stuck(RuntimeError):
    """What was waited for has not come."""


@dataclass(slots=True)
class Request:
    """`outcome` is empty while it runs; then right, near tie, changed or failed, and how. `streams`: it has tokens.
    `differs`: other weights answer it otherwise.

    Times in seconds of this machine's monotonic clock. `events`: of a stream that has ended. `errors`: each time that
    it failed and was asked again, which host had it, and how it failed.
    """

    host: str
    what: str
    sent: float = 0.0
    differs: bool = False
    streams: bool = False
    outcome: str = ""
    ended: float = math.inf
    events: list[float] = field(default_factory=list)
    errors: list[tuple[float, str, str]] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return self.outcome in ("right", "near tie", BY_OTHER)

    @property
    def took_s(self) -> float:
        return self.ended - self.sent

    @property
    def is_long(self) -> bool:
        return " long " in self.what

    def pause_s(self, since: float = -math.inf, until: float = math.inf) -> float:
        """The longest time between two events of a stream, of those that ended then."""
        gaps = [after - before for before, after in itertools.pairwise(self.events) if since < after <= until]
        return max(gaps, default=0.0)


class Clients:
    """So many, each with one request at a time, in this namespace. `other`: a second checkpoint that may answer."""

    def __init__(
        self, space: str, number: int, directory: Path, environment: Mapping[str, str], other: Path | None = None
    ) -> None:
        self._number, self._log = number, directory / "clients.log"
        command = [sys.executable, "-m", "benchmarks.pods_parts.load", str(number)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                inside(space, [*command, *([] if other is None else [str(other)])]),
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._requests: dict[str, Request] = {}
        self._changed = threading.Condition()
        self.names: dict[str, str] = {}  # of hosts whose certificates are not the service's
        self.questions = self.differ = 0  # once they are known; how many the other checkpoint answers otherwise
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self._take(json.loads(line))
                self._changed.notify_all()

    def _take(self, told: dict[str, object]) -> None:
        match told:
            case {"questions": int(number), "differ": int(differ)}:
                self.questions, self.differ = number, differ
            case {
                "label": str(label),
                "host": str(host),
                "what": str(what),
                "sent": float(sent),
                "differs": bool(differs),
            }:
                self._requests[label] = Request(host, what, sent, differs)
            case {"label": str(label), "streams": True}:
                self._requests[label].streams = True
            case {"label": str(label), "host": str(host), "error": str(error), "at": float(at)}:
                request = self._requests[label]
                request.errors.append((at, request.host, error))
                request.host = host
            case {"label": str(label), "outcome": str(outcome), "ended": float(ended), "events": list(events)}:
                request = self._requests[label]
                request.outcome, request.ended, request.events = outcome, ended, events
            case _:
                raise ValueError(f"got {told} from the clients")

    def ask(self, *hosts: str, easy: bool = False, long: bool = False, again: bool = False, anew: bool = False) -> None:
        """From now on each new request goes to one of these; without hosts nobody asks. `easy`: a few, for processes
        start that need the cores too. `long`: only streams, each of which takes seconds. `again`: what fails is asked
        again under its name, of the next host. `anew`: over other connections than before."""
        assert self._process.stdin is not None
        most, pause_s = (_FEW, _REST_S) if easy else (self._number, 0.0)
        named = {host: self.names.get(host, SERVICE) for host in hosts}
        told = {"hosts": named, "most": most, "pause_s": pause_s, "long": long, "again": again, "anew": anew}
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

    def wait_for_long_streams(self, number: int, within_s: float, host: str | None = None) -> None:
        """Until so many stream at once."""

        def streaming() -> int:
            return sum(r.is_long and r.streams and not r.outcome for r in self.requests(host))

        self._wait(lambda: streaming() >= number, within_s)

    def wait_for_a_mixture(self, begun: int, silent: int, within_s: float) -> None:
        """Until so many streams that have begun are under way, and so many requests without any answer yet."""

        def is_there() -> bool:
            streams = [request.streams for request in self.requests() if not request.outcome]
            return streams.count(True) >= begun and streams.count(False) >= silent

        self._wait(is_there, within_s)

    def wait_until_idle(self, within_s: float, host: str | None = None) -> None:
        self._wait(lambda: not self.under_way(host), within_s)

    def wait_for_questions(self, within_s: float) -> None:
        self._wait(lambda: bool(self.questions), within_s)

    def _wait(self, done: Callable[[], bool], within_s: float) -> None:
        deadline = time.monotonic() + within_s
        with self._changed:
            while not done():
                if self._process.poll() is not None:
                    raise Stuck(f"the clients have ended: {self._log.read_text()[-3000:]}")
                if time.monotonic() > deadline:
                    raise Stuck(f"nothing moves: {self.summary()}")
                self._changed.wait(0.2)

    def summary(self) -> str:
        requests = self.requests()
        counted = Counter((request.host, request.outcome or "under way") for request in requests)
        told = [f"{number} {outcome} ({host})" for (host, outcome), number in sorted(counted.items())]
        slowest_s = max((request.took_s for request in requests if request.outcome), default=0.0)
        return "; ".join([*told, f"the slowest took {slowest_s:.2f} s"])

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
