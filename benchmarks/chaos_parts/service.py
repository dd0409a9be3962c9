"""A service of the demo on its own Ray with a second node: its processes, and checks that everything is in order.
Everything is on this machine and on loopback.
"""

import asyncio
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.config import ServiceConfig
from cluster.ops import local_ray

_NODE = {"node_ip_address": "127.0.0.2", "object_store_memory": 2**27}
_ROUTER_CPUS, _CPU_PER_PROCESS = 0.1, 0.1  # of cluster/app.py and actors/settings.py
_TOWERS = ("ray::ContextActor", "ray::DenoiserActor", "ray::ColocatedActor")
_CELL, _ROUTER = "ray::ServeReplica:twotower:Cell", "ray::ServeReplica:twotower:Router"
TITLES = {"context": _TOWERS[0], "denoiser": _TOWERS[1], "tower": _TOWERS[2], "cell": _CELL, "router": _ROUTER}
TITLES |= {"controller": "ray::ServeController", "proxy": "ray::ProxyActor"}
_RESUMED = re.compile(r"run \S+ \((\S+)\) goes on after \d+ tokens")
_ANSWER_S = 10.0
_SECOND, _FILLER = "second node", "filler"


@dataclass(frozen=True, slots=True)
class Shape:
    """`cells` of them, the last on a second node where there are two."""

    placement: str
    cells: int

    @property
    def processes(self) -> int:
        """Tower processes of a cell."""
        return 2 if self.placement == "split" else 1

    @property
    def cpus(self) -> float:
        """Of a cell, as Ray counts them."""
        return _CPU_PER_PROCESS * (1 + self.processes)


@dataclass(frozen=True, slots=True)
class Census:
    """What of the service there is at a moment: processes by kind, towers that answer, requests and room."""

    processes: Counter[str]
    groups: int
    cells: int
    towers: int
    held: int
    free: bool
    strays: tuple[int, ...]


class Service:
    """One that runs. `http` and `grpc`: where it listens."""

    def __init__(self, shape: Shape, config: ServiceConfig, cluster: Any) -> None:
        self.shape, self._cluster = shape, cluster
        self.http, self.grpc = f"127.0.0.1:{config.ingress.http_port}", f"127.0.0.1:{config.ingress.grpc_port}"
        self._session = Path(os.path.realpath(cluster.head_node.get_session_dir_path()))
        self._read: dict[Path, int] = {}
        self.second_node: Any = None

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Those of this service by kind; also what has lost its parent."""
        found: dict[str, list[psutil.Process]] = {kind: [] for kind in TITLES}
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                title = "".join(process.cmdline()[:1])
                kind = next((kind for kind, begin in TITLES.items() if title.startswith(begin)), None)
                if kind is not None and self._is_ours(process) and process.status() != psutil.STATUS_ZOMBIE:
                    found[kind].append(process)
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        return any(file.path.startswith(f"{self._session}/logs/") for file in process.open_files())

    def raylet(self) -> psutil.Process:
        """Of the second node."""
        [info] = self.second_node.all_processes["raylet"]
        return psutil.Process(info.process.pid)

    def add_second_node(self) -> None:
        """With room for a cell; in the place of one that has died."""
        if self.second_node is not None:
            self._cluster.remove_node(self.second_node, allow_graceful=False)
            self._cluster._shutdown_at_exit = False  # its handler of signals wants the main thread, which has clients
        self.second_node = self._cluster.add_node(num_cpus=1, resources={_SECOND: 1}, **_NODE)

    def resumed(self) -> set[str]:
        """The labels of requests that went on elsewhere since this was last asked, by the routers' logs."""
        labels = set[str]()
        for process in self.processes()["router"]:
            for path in self._session.glob(f"logs/worker-*-{process.pid}.err"):
                with path.open(errors="replace") as log:
                    log.seek(self._read.get(path, 0))
                    labels.update(_RESUMED.findall(log.read()))
                    self._read[path] = log.tell()
        return labels

    async def census(self) -> Census:
        """Raises TimeoutError where Serve does not answer."""
        from ray.util import placement_group_table

        async with asyncio.timeout(_ANSWER_S):
            stats = await self.stats()
            groups = await asyncio.to_thread(placement_group_table)
        known = {int(home["pid"]) for cell in stats for home in cell.homes}
        processes = self.processes()
        towers = [process.pid for kind in ("context", "denoiser", "tower") for process in processes[kind]]
        told = [tower for cell in stats for tower in cell.towers]
        return Census(
            Counter({kind: len(some) for kind, some in processes.items()}),
            sum(group["state"] != "REMOVED" and not group["name"].startswith(_FILLER) for group in groups.values()),
            len(stats),
            len(told) if known <= set(towers) else 0,
            sum(cell.running + cell.waiting for cell in stats),
            all((t.sequences, t.free_slots, t.free_pages) == (0, t.total_slots, t.total_pages) for t in told),
            tuple(pid for pid in towers if pid not in known),
        )

    async def stats(self) -> list[Any]:
        """Of every cell. Serve's handle picks one for each call, so they are asked often enough."""
        from ray import serve

        handle: Any = serve.get_deployment_handle("Cell", "twotower")
        found: dict[str, Any] = {}
        for asked in range(24):
            if len(found) < self.shape.cells or asked < self.shape.cells:
                stats = await handle.stats.remote()
                found[stats.homes[0]["pid"]] = stats
        return list(found.values())

    def wrong(self, census: Census, idle: bool = False) -> list[str]:
        """What is not as it should be in a whole service; in an `idle` one nothing may be held either."""
        cells, processes = self.shape.cells, census.processes
        towers = processes["context"] + processes["denoiser"] + processes["tower"]
        wrong = [
            f"{name}: {got}, wanted {wanted}"
            for name, got, wanted in (
                ("cells that answer", census.cells, cells),
                ("towers that answer", census.towers, cells * (2 if self.shape.placement != "ar_only" else 1)),
                ("tower processes", towers, cells * self.shape.processes),
                ("cell processes", processes["cell"], cells),
                ("router processes", processes["router"], 1),
                ("placement groups", census.groups, cells),
            )
            if got != wanted
        ]
        if census.strays:
            wrong.append(f"tower processes of no cell: {census.strays}")
        if idle and (census.held or not census.free):
            wrong.append(f"not all given back: {census.held} requests held, slots and pages free: {census.free}")
        return wrong

    async def until_right(self, within_s: float, idle: bool = False) -> tuple[float, list[str]]:
        """Waits until nothing is wrong, no longer than so many seconds: how long it took, and what is wrong still."""
        began = time.monotonic()
        while True:
            try:
                wrong = await self._running() or self.wrong(await self.census(), idle)
            except Exception as error:  # Ray's and Serve's own, of many kinds, while parts of them are down
                wrong = [f"no answer: {type(error).__name__}"]
            took_s = time.monotonic() - began
            if not wrong or took_s > within_s:
                return took_s, wrong
            await asyncio.sleep(0.3)

    async def _running(self) -> list[str]:
        from cluster.cli.asking import is_ready
        from cluster.ops.deployment import progress

        now = await asyncio.to_thread(progress)
        ready = await asyncio.to_thread(is_ready, self.http)
        if (now.routers, now.cells, ready) == (1, self.shape.cells, True):
            return []
        return [f"{now.routers} routers and {now.cells} cells running, ready: {ready}"]


@contextmanager
def running_service(shape: Shape, settings: dict[str, dict[str, Any]], ports: tuple[int, int]) -> Iterator[Service]:
    """A head node with room for a router and a cell, and a second one with room for another."""
    local_ray.prepare_environment()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from cluster.ops import deployment

    config = _config(shape, settings, ports)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **_NODE})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        _fill({"CPU": 1 - _ROUTER_CPUS - shape.cpus})
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": ports[0]},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        deployment.deploy(config)
        service = Service(shape, config, cluster)
        if shape.cells > 1:
            _wait_for_first_cell(deployment.progress)
            service.add_second_node()
            _fill({"CPU": 1 - shape.cpus, _SECOND: 1})
        took_s, wrong = asyncio.run(service.until_right(120.0))
        if wrong:
            raise RuntimeError(f"the service is not whole after {took_s:.0f} s: {'; '.join(wrong)}")
        yield service
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def _fill(bundle: dict[str, float]) -> None:
    """Takes what a node has beyond the room wanted there: nodes have whole CPUs, and ours ask for tenths."""
    from ray.util import placement_group

    name = f"{_FILLER} {' '.join(bundle)}"
    placement_group([{name: round(value, 1) for name, value in bundle.items()}], name=name).wait(30)


def _config(shape: Shape, settings: dict[str, dict[str, Any]], ports: tuple[int, int]) -> ServiceConfig:
    values: dict[str, dict[str, Any]] = {
        "cell": {"placement": shape.placement, "device": "cpu"},
        "cluster": {"min_cells": shape.cells, "max_cells": shape.cells, "drain_timeout_s": 5.0},
        "ingress": {"http_port": ports[0], "grpc_port": ports[1]},
    }
    for name, section in settings.items():
        values[name] = values.get(name, {}) | section
    return ServiceConfig.parse(values)


def _wait_for_first_cell(progress: Any, within_s: float = 120.0) -> None:
    """Before there is a second node, so that the router is not on it: a router's death is another story."""
    deadline = time.monotonic() + within_s
    while not ((now := progress()).routers and now.cells):
        if now.failure is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the first cell does not come up: {now}")
        time.sleep(0.3)
