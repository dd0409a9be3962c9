"""How long one delta takes from a context process to a denoiser process, against a bare gloo loop in the same run.

    python -m benchmarks.exchange --sizes-kb 256 4096 32768 --rounds 3 --exchanges 60

An exchange is a commit one way and its delta back, applied to the mirror; the context engine computes nothing. The
bare loop sends 1 KB one way, and as many bytes back as the delta has, into a buffer nobody reads. Both use the same two
processes, and process groups of the same kind. Rounds of both alternate.
"""

import argparse
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from twotower.config import ModelConfig
from twotower.exchange.data_group import CONTEXT_RANK, DENOISER_RANK, DataGroup, join_store, serve_store
from twotower.exchange.distributed import connect, open_port
from twotower.exchange.protocol import Commit, Delta, Link, Port, Prefill
from twotower.exchange.settings import EngineHooks, LinkSettings
from twotower.exchange.staging import DeltaLayout, StagingBuffer
from twotower.model.cache import TowerCache

_CPU = torch.device("cpu")
_BLOCK = 16
_REQUEST_BYTES = 1024
_TIMEOUT_S = 60.0
_LAYER_BYTES = 16 * 64 * 64 * 4


@dataclass(frozen=True)
class Plan:
    """One size: `rounds` times `exchanges` of the bare loop, then as many of the link."""

    target_bytes: int
    rounds: int
    exchanges: int
    settings: LinkSettings

    @property
    def positions(self) -> int:
        return (self.rounds * self.exchanges + 1) * _BLOCK

    def cache(self) -> TowerCache:
        mamba_layers = max(self.target_bytes // _LAYER_BYTES, 1)
        config = ModelConfig(
            hybrid_override_pattern="M" * mamba_layers + "*",
            mamba_num_heads=16,
            mamba_head_dim=64,
            ssm_state_size=64,
            n_groups=1,
            num_key_value_heads=2,
            head_dim=64,
        )
        return TowerCache(config, 1, -(-self.positions // _BLOCK), _CPU, torch.float32)

    def delta_bytes(self, cache: TowerCache) -> int:
        return DeltaLayout(cache, self.settings.ssm_wire_dtype).nbytes([Delta(1, 0, _BLOCK, 0)])


class Bare:
    """The two-rank group of the bare loop, at one end."""

    def __init__(self, group: DataGroup, nbytes: int) -> None:
        self._group = group
        self._request = StagingBuffer(_REQUEST_BYTES, _CPU, through_host=True)
        self._reply = StagingBuffer(nbytes, _CPU, through_host=True)
        self._nbytes = nbytes

    def ask(self) -> None:
        self._group.send(self._request, _REQUEST_BYTES, 1, _TIMEOUT_S)
        self._group.receive(self._reply, self._nbytes, 2, _TIMEOUT_S)

    def answer(self) -> None:
        self._group.receive(self._request, _REQUEST_BYTES, 1, _TIMEOUT_S)
        self._group.send(self._reply, self._nbytes, 2, _TIMEOUT_S)


def context_process(pipe: "Connection[Any, Any]", plans: list[Plan]) -> None:
    torch.set_num_threads(1)
    for plan in plans:
        cache, woken = plan.cache(), threading.Event()
        port, address = open_port(cache, 0, 0, plan.settings, EngineHooks(on_activity=woken.set))
        store = serve_store("127.0.0.1", _TIMEOUT_S)
        pipe.send((address, store.port))
        group = DataGroup("gloo", store, CONTEXT_RANK, _CPU, "127.0.0.1", _TIMEOUT_S)
        bare = Bare(group, plan.delta_bytes(cache))
        _serve(port, cache, woken, 1)
        for _ in range(plan.rounds):
            for _ in range(plan.exchanges):
                bare.answer()
            _serve(port, cache, woken, plan.exchanges)
        pipe.recv()
        port.close()


def _serve(port: Port, cache: TowerCache, woken: threading.Event, commands: int) -> None:
    """Answer so many commands as an engine would whose forward takes no time."""
    while commands:
        woken.wait(1)
        woken.clear()
        for command in port.receive():
            if isinstance(command, Prefill):
                cache.allocate(command.reserve)
            start = cache.length(0)
            cache.advance(0, _BLOCK)
            port.send([Delta(1, start, start + _BLOCK, 0)])
            commands -= 1


def measure(pipe: "Connection[Any, Any]", plan: Plan) -> tuple[int, list[float], list[float]]:
    """Bytes of a delta, seconds of each bare and of each link exchange."""
    address, store_port = pipe.recv()
    cache, woken = plan.cache(), threading.Event()
    nbytes = plan.delta_bytes(cache)
    store = join_store("127.0.0.1", store_port, _TIMEOUT_S)
    bare = Bare(DataGroup("gloo", store, DENOISER_RANK, _CPU, "127.0.0.1", _TIMEOUT_S), nbytes)
    link = connect(address, cache, EngineHooks(on_activity=woken.set))
    link.submit([Prefill(1, tuple(range(_BLOCK)), plan.positions)])
    length = _next_length(link, woken)
    bare_s: list[float] = []
    link_s: list[float] = []
    for _ in range(plan.rounds):
        bare_s += [_seconds(bare.ask) for _ in range(plan.exchanges)]
        for _ in range(plan.exchanges):
            started = time.perf_counter()
            link.submit([Commit(1, length, tuple(range(_BLOCK)))])
            length = _next_length(link, woken)
            link_s.append(time.perf_counter() - started)
    pipe.send("done")
    link.close()
    return nbytes, bare_s, link_s


def _next_length(link: Link, woken: threading.Event) -> int:
    while True:
        for event in link.poll():
            assert isinstance(event, Delta), event
            return event.end
        woken.wait(1)
        woken.clear()


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def row(nbytes: int, bare_s: list[float], link_s: list[float]) -> str:
    bare, link = _percentiles_ms(bare_s), _percentiles_ms(link_s)
    cells = [f"{nbytes / 1024:.0f}", *(f"{ms:.3f}" for ms in (*bare, *link)), f"{link[0] / bare[0]:.2f}"]
    return "| " + " | ".join(cells) + " |"


def _percentiles_ms(seconds: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return cuts[49] * 1000, cuts[98] * 1000


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes-kb", type=int, nargs="+", default=[256, 4096, 32768], help="bytes of SSM state, in KB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--exchanges", type=int, default=60, help="per round and loop")
    parser.add_argument("--ssm-wire-dtype", default="float32", choices=("float32", "bfloat16"))
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    settings = LinkSettings(ssm_wire_dtype=arguments.ssm_wire_dtype, staging_bytes=1 << 20)
    plans = [Plan(kb << 10, arguments.rounds, arguments.exchanges, settings) for kb in arguments.sizes_kb]
    spawn = multiprocessing.get_context("spawn")
    pipe, far_end = spawn.Pipe()
    context = spawn.Process(target=context_process, args=(far_end, plans), daemon=True)
    context.start()
    print("| delta, KB | bare p50, ms | bare p99 | link p50, ms | link p99 | p50 ratio |")
    print("|---|---|---|---|---|---|")
    for plan in plans:
        print(row(*measure(pipe, plan)), flush=True)
    context.join(10)


if __name__ == "__main__":
    main()
