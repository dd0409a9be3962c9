"""What watching costs a service: metrics, a log line a request, the ops page, and traces.

Starts a service of the demo (colocated, one cell, all on loopback) and a collector for its traces. The service can
switch its observers while it runs. Each round sends the same requests without observers, with the default ones, and
with traces, in turn. It also measures each observer's own CPU time for a request, without a service.

examples:
  python -m benchmarks.watching
  python -m benchmarks.watching --alone                  # without Ray: the observers against the engines, CPU time only
  python -m benchmarks.watching --rounds 12 --output benchmarks/results/watching_<hardware>_<date>.md
"""

import argparse
import asyncio
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the towers of the demo are so small that threads only wait

import psutil
from tqdm import tqdm

from benchmarks.chaos_parts.service import Service, Shape, running_service
from benchmarks.reference.driver import drive
from benchmarks.reference.paths import ServedPath
from benchmarks.reference.report import bullets, setting, spread, table
from benchmarks.reference.service import free_ports
from benchmarks.reference.workload import DEMO, Workload
from benchmarks.watching_parts.engines import Engines
from benchmarks.watching_parts.figures import AIM, MEASURES, Found, Slice, Way, lost, surely
from benchmarks.watching_parts.observers import OBSERVERS, costs_us
from benchmarks.watching_parts.sink import Sink, sink
from cluster.ops import local_ray
from twotower.commands.parser import count
from twotower.core import Mode
from twotower.model.checkpoint import Checkpoint

_TOKENS, _CLIENTS = 64, 16
_MODES = (Mode.DIFFUSION, Mode.AR)
_ALONE, _ALONE_TIMES = 320, 5  # requests, and how often
Costs = dict[tuple[str, Mode], list[float]]  # microseconds, by observer and mode


class Experiment:
    """Asks in turns: what the machine does meanwhile hits all ways alike."""

    def __init__(self, service: Service, traces: Sink, rounds: int, requests: int) -> None:
        self._service, self._traces, self._rounds, self._requests = service, traces, rounds, requests
        self._workload = Workload(Checkpoint.open(DEMO), _TOKENS, 0.8, ignore_eos=True)
        [self._router] = service.processes()["router"]
        self._handles: list[Any] = []
        self.found = Found()
        self.received = (0, 0)

    async def run(self) -> Found:
        from ray import serve

        self._handles = [serve.get_deployment_handle(name, "twotower") for name in ("Router", "Cell")]
        for mode in _MODES:
            await self._slice(mode, Way.TRACES, "warm")
        ways = tuple(Way)
        for number in tqdm(range(self._rounds), unit="round", smoothing=0):
            for mode in _MODES:
                for way in ways[number % 3 :] + ways[: number % 3]:
                    self.found.add(mode, way, await self._slice(mode, way, str(number)))
        self.received = self._traces.received()
        return self.found

    async def _slice(self, mode: Mode, way: Way, name: str) -> Slice:
        await self._switch(way)
        requests = self._workload.requests(mode, self._requests, f"{name}-{mode}-{way.name}".lower())
        router_s, service_s = self._cpu_s()
        measured = await drive(ServedPath(self._service.grpc), (), requests, _CLIENTS)
        router_after_s, service_after_s = self._cpu_s()
        return Slice(
            len(requests), measured.num_tokens, measured.seconds, tuple(one.arrivals[-1] for one in measured.answers),
            router_after_s - router_s, service_after_s - service_s,
        )  # fmt: skip

    async def _switch(self, way: Way) -> None:
        """Raises RuntimeError where the traces of before have not come."""
        for handle in self._handles:
            await handle.watched.remote(str(way))
        if self.found.slices and not self._traces.received()[1]:
            raise RuntimeError("the collector has got no traces")

    def _cpu_s(self) -> tuple[float, float]:
        """Of the router, and of all that this process has started but the collector: Ray's, Serve's and ours."""
        others = [one for one in psutil.Process().children(recursive=True) if one.pid != self._traces.pid]
        return _used_s(self._router), sum(map(_used_s, others))


def _used_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _alone() -> Costs:
    return {
        (name, mode): [costs_us(name, mode, _TOKENS, _ALONE) for _ in range(_ALONE_TIMES)]
        for mode in _MODES
        for name in OBSERVERS
    }


def _served(rounds: int, requests: int) -> tuple[Found, tuple[int, int]]:
    """And what the collector has got: calls and bytes."""
    local_ray.prepare_environment()  # before anything imports Ray
    from benchmarks.watching_parts.switched import switchable

    with sink() as traces:
        os.environ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] = f"http://127.0.0.1:{traces.port}/v1/traces"
        with switchable(), running_service(Shape("colocated", 1), {}, free_ports()) as service:
            experiment = Experiment(service, traces, rounds, requests)
            return asyncio.run(experiment.run()), experiment.received


def _engines() -> dict[str, list[float]]:
    """Milliseconds of a request, by mode."""
    engines = Engines(_TOKENS)
    return {mode: asyncio.run(engines.costs_ms(mode, _CLIENTS, _ALONE_TIMES)) for mode in _MODES}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=count, default=9, help="each way once in each (%(default)s)")
    parser.add_argument("--requests", type=count, default=96, help="of each way and mode in a round (%(default)s)")
    parser.add_argument("--alone", action="store_true", help="no service: CPU time of observers and of engines")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the report there")
    options = parser.parse_args(arguments)
    load_before = os.getloadavg()[0]
    alone = _alone()
    command = shlex.join(["python", "-m", "benchmarks.watching", *(sys.argv[1:] if arguments is None else arguments)])
    if options.alone:
        report = render_alone(alone, _engines(), bullets(setting(load_before, command)))
    else:
        found, received = _served(options.rounds, options.requests)
        told = {"collector": f"{received[0]} calls, {received[1]} bytes of spans"}
        report = render(found, alone, bullets(setting(load_before, command) | told))
    print(report)
    if options.output is not None:
        options.output.write_text(report, encoding="utf-8")
    return 0


def render(found: Found, alone: Costs, where: str) -> str:
    """The whole report."""
    spent = {mode: statistics.median(found.values(mode, Way.OFF, MEASURES[4])) for mode in found.modes}
    return f"""# What watching costs a service

{where}

- {_CLIENTS} clients over gRPC, answers of {_TOKENS} tokens, γ 0.8, EOS ignored. A slice is {_requests(found)} requests.
- {Way.OFF}: no observer in the router, nothing told to Ray, no second of the ops page kept. What cells tell routers
  and Serve goes on: it is not for watching alone.
- {Way.DEFAULT}: metrics, a log line a request, the ops page's seconds. {Way.TRACES}: spans beside them, sent to a
  collector in a process of its own on the same cores.
- Each is the median over the rounds, smallest to largest in brackets; ÷ is by the round. The CPU time of the service is
  that of all its processes, Ray's own among them.

{_verdict(found)}

{_ways(found)}

{_observers(alone, "the service's", spent)}
"""


def render_alone(alone: Costs, engines: dict[str, list[float]], where: str) -> str:
    """The report of a run without a service."""
    spent = {mode: statistics.median(times) for mode, times in engines.items()}
    rows = [[mode, spread(times, 1)] for mode, times in engines.items()]
    return f"""# What watching costs: the observers alone

{where}

No service ran: this is CPU time alone, and throughput was not measured. The engines are a pair of the demo in this
process, {_CLIENTS} requests together; a service spends more on a request than they do, so the shares are upper bounds.

{table(["mode", "engines, CPU ms a request"], rows)}

{_observers(alone, "the engines'", spent)}
"""


def _observers(alone: Costs, whose: str, spent_ms: dict[str, float]) -> str:
    """Medians of both; the share of all that are on by default, too."""
    rows = []
    for mode in dict.fromkeys(mode for _, mode in alone):
        costs = {name: times for (name, of), times in alone.items() if of == mode}
        usual = sum(statistics.median(times) for name, times in costs.items() if name != "traces")
        shown = [(name, spread(times, 0), statistics.median(times)) for name, times in costs.items()]
        for name, text, cost_us in [*shown, ("all but traces", f"{usual:.0f}", usual)]:
            rows.append([mode, name, text, f"{cost_us / 10 / spent_ms[mode]:.2f} %"])
    return f"""## Each observer by itself

CPU time for a request of {_TOKENS} tokens, in this process: {_ALONE} requests, {_CLIENTS} at a time,
{_ALONE_TIMES} times; medians, smallest to largest in brackets. Neither telling Ray nor sending spans is in it.

{table(["mode", "observer", "µs a request", f"of {whose} CPU time for one"], rows)}"""


def _requests(found: Found) -> int:
    return next(iter(found.slices.values()))[0].requests


def _verdict(found: Found) -> str:
    """By the interval of the median, or where there are few rounds by the smallest and the largest."""
    lines = []
    for mode in found.modes:
        for way in (Way.DEFAULT, Way.TRACES):
            speed, cpu = found.ratios(mode, way, MEASURES[0]), found.ratios(mode, way, MEASURES[4])
            low, high = surely(speed)
            aim = _against_aim(1 - high, 1 - low)
            lines.append(
                f"- `{mode}`, {way}: {100 * lost(speed):.1f} % of the throughput is gone, "
                f"between {100 * (1 - high):.1f} and {100 * (1 - low):.1f} % ({aim} {100 * AIM:.0f} %), "
                f"{100 * (statistics.median(cpu) - 1):+.1f} % CPU time."
            )
    return "\n".join(lines)


def _against_aim(least: float, most: float) -> str:
    """Of what is gone of the throughput."""
    if most <= AIM:
        return "within the aim of"
    return "MORE than the aim of" if least > AIM else "not settled: the aim is"


def _ways(found: Found) -> str:
    rows = []
    for mode in found.modes:
        for measure in MEASURES:
            values = [spread(found.values(mode, way, measure), measure.digits) for way in Way]
            ratios = [spread(found.ratios(mode, way, measure), 3) for way in (Way.DEFAULT, Way.TRACES)]
            rows.append([mode, measure.name, *values, *ratios])
    return table(["mode", "", *Way, f"{Way.DEFAULT} ÷ {Way.OFF}", f"{Way.TRACES} ÷ {Way.OFF}"], rows)


if __name__ == "__main__":
    raise SystemExit(main())
