"""A real service for tests: Router and Cell on the session's Ray, with free ports and a golden checkpoint."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.reference.service import free_port
from cluster.app import APP_NAME
from cluster.cell import CellStats
from cluster.cli.asking import is_ready
from cluster.config import ServiceConfig
from cluster.ops import deployment, local_ray
from tests.goldens import VENDORED


@dataclass(frozen=True)
class Service:
    """Where a running service listens, and its configuration."""

    http: str
    grpc: str
    values: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def stats(self) -> CellStats:
        """The cell's own view, asked past the routers."""
        from ray import serve

        handle: Any = serve.get_deployment_handle("Cell", APP_NAME)
        stats: CellStats = await handle.stats.remote()
        return stats

    async def all_free(self, within_s: float = 10.0) -> float:
        """Waits until the cell holds nothing, on any tower; how long that took."""
        began = time.monotonic()
        while True:
            stats = await self.stats()
            towers_free = all(
                (t.sequences, t.free_slots, t.free_pages) == (0, t.total_slots, t.total_pages) for t in stats.towers
            )
            if stats.running == stats.waiting == 0 and towers_free:
                return time.monotonic() - began
            assert time.monotonic() - began < within_s, f"not everything was given back: {stats}"
            await asyncio.sleep(0.02)


@contextmanager
def running_service(**sections: dict[str, Any]) -> Iterator[Service]:
    """Needs the `ray_cluster` fixture. Sections add to those of a small golden checkpoint on the CPU."""
    from ray import serve

    http_port, grpc_port = free_port(), free_port()
    values: dict[str, dict[str, Any]] = {
        "model": {"checkpoint": str((VENDORED / "tt_moe").resolve()), "max_sequence_length": 1024},
        "cell": {"placement": "split", "device": "cpu", "max_sequences": 16, "capture": "off"},
        "cluster": {"drain_timeout_s": 5.0},
        "ingress": {"http_port": http_port, "grpc_port": grpc_port},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    config = ServiceConfig.parse(values)
    service = Service(f"127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}", values)
    local_ray.start_serve(config.ingress)
    try:
        deployment.deploy(config)
        _wait_until_ready(service)
        yield service
    finally:
        serve.shutdown()


def _wait_until_ready(service: Service, within_s: float = 180.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_ready(service.http):
        failure = deployment.progress().failure
        assert failure is None, failure
        assert time.monotonic() < deadline, "the service never became ready"
        time.sleep(0.2)
