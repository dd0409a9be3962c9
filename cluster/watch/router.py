"""One router's reports: observers for its runs, and once a second its load and the living cells."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from cluster.faces.error_codes import CODES
from cluster.readiness import Readiness
from cluster.runs.admission import Admission
from cluster.runs.allowances import LIMITS
from cluster.runs.cell_lines import CellLines
from cluster.runs.observers import Observer
from cluster.runs.turns import Turns
from cluster.watch import otlp
from cluster.watch import router_metrics as metrics
from cluster.watch.files import NO_FILES, Files
from cluster.watch.metric import Kind, declared_in
from cluster.watch.ray_exporter import RayExporter
from cluster.watch.request_log import RequestLog
from cluster.watch.run_metrics import RunMetrics
from cluster.watch.run_traces import RunTraces
from cluster.watch.tally import Exporter, Tally, flush_for_ever
from cluster.watch.words import SCORE
from twotower.core import FinishReason, Mode

_AT = "router"  # in place of a cell's name: for requests that wait in the router


class RouterWatch:
    """`observers` are for the runs. Call `start` in the runs' event loop."""

    def __init__(
        self,
        model: str,
        modes: Iterable[Mode],
        exporter: Exporter | None = None,
        keys: Sequence[str] = (),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`keys`: the names of all keys."""
        self._keys, self._now = keys, now
        self._modes, self._exporter = tuple(modes), exporter or RayExporter({"model_name": model})
        self._tally = Tally()
        self._runs = RunMetrics(self._tally)
        self.observers: tuple[Observer, ...] = (RequestLog(), self._runs)
        self._spans = otlp.provider()
        if self._spans is not None:
            self.observers += (RunTraces(self._spans.get_tracer("twotower"), model),)
        self._flushing: asyncio.Task[None] | None = None
        self._begin()

    def start(
        self,
        admission: Admission,
        turns: Turns,
        lines: CellLines,
        readiness: Readiness,
        files: Files = NO_FILES,
    ) -> None:
        def read() -> None:
            self._read_files(files)
            self._runs.read()
            self._tally.set(metrics.OPEN, admission.running)
            self._tally.set(metrics.WAITING, turns.waiting, _AT)
            self._tally.set(metrics.LONGEST_WAIT, turns.longest_wait_s())
            self._tally.set(metrics.READY, bool(readiness()))
            for mode in self._modes:
                self._tally.set(metrics.CELLS, len(lines.living(mode)), mode)

        self._flushing = asyncio.create_task(flush_for_ever(self._tally, self._exporter, read))

    def _read_files(self, files: Files) -> None:
        for name, fault in files.faults().items():
            self._tally.set(metrics.FILE_FAULT, bool(fault), name)
        for face, ends in files.ends().items():
            self._tally.set(metrics.CERTIFICATE_LEFT, (ends - self._now()).total_seconds(), face)

    async def stop(self) -> None:
        """Stop, after a last flush."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._runs.read()
            self._tally.flush(self._exporter)
        if self._spans is not None:
            await asyncio.to_thread(otlp.finish, self._spans)

    def _begin(self) -> None:
        """Begin every possible counter with 0: a rate does not see an increase from nothing."""
        values = {
            "mode": (*self._modes, SCORE),
            "finished_reason": tuple(FinishReason),
            "code": tuple(sorted({code.grpc.name for code in CODES.values()})),
            "reason": ("cell_lost", "gap", "handed_over"),
            "key": tuple(self._keys),
            "limit": LIMITS,
            "chosen": (Mode.AR, Mode.DIFFUSION, Mode.VERIFIED),
        }
        for metric in declared_in(vars(metrics)):
            if metric.kind is Kind.COUNTER:
                for labels in metric.series(values):
                    self._tally.add(metric, 0, *map(str, labels))
