"""A gateway before the routers: an Envoy on a host of its own, configured by `envoy.yaml` beside this file.

The bench tells it which hosts there are, as a controller does by a Service. Which of them are healthy it asks itself.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pods_parts.clients import Stuck
from benchmarks.pods_parts.faces import GRPC_PORT, HTTP_PORT
from benchmarks.pods_parts.network import inside
from benchmarks.pods_parts.secrets import GATEWAY
from benchmarks.pods_parts.site import Site

CONFIG = Path(__file__).with_name("envoy.yaml")
FACES = {"http": HTTP_PORT, "grpc": GRPC_PORT}
_ADMIN, _ASK_S = 9901, 5
_LIST = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
_HEALTHY = {"eds_health_status": "HEALTHY"}  # as the list says; a failed check comes beside it


class Gateway:
    """Clients ask it at `address`, on the routers' own ports, over both faces."""

    def __init__(self, where: Site, hosts: Sequence[str]) -> None:
        self._pod, self._client = where.pod("gateway"), where.client
        self.address = self._pod.address
        where.secrets.write_gateways(self._pod.ray)
        where.load.names[self.address] = GATEWAY
        self.route(*hosts)
        self._pod.start(f"exec envoy --config-path {CONFIG} --concurrency 1 --disable-hot-restart")

    def route(self, *hosts: str) -> None:
        """From now on it sends requests to these only. What others have goes on."""
        write_hosts(self._pod.ray, hosts)

    def is_ready(self, *hosts: str) -> bool:
        """Whether it takes these for healthy over both faces, and knows no other."""
        wanted = dict.fromkeys(hosts, True)
        try:
            return all(
                {_address(host): host["health_status"] == _HEALTHY for host in self._hosts(face)} == wanted
                for face in FACES
            )
        except Stuck:  # it has not come up yet
            return False

    def requests(self) -> dict[str, dict[str, int]]:
        """By face, how many each host has got that it knows now, those that were sent again too."""
        return {face: {_address(host): _number(host, "rq_total") for host in self._hosts(face)} for face in FACES}

    def sent_again(self) -> dict[str, int]:
        """By face, how many requests went to a second host, since the first one failed."""
        return {face: self._sent_again(face) for face in FACES}

    def _sent_again(self, face: str) -> int:
        [stat] = json.loads(self._asked(f"/stats?format=json&filter=^cluster.{face}.upstream_rq_retry$"))["stats"]
        return int(stat["value"])

    def _hosts(self, face: str) -> list[dict[str, Any]]:
        clusters = json.loads(self._asked("/clusters?format=json"))["cluster_statuses"]
        [hosts] = [cluster.get("host_statuses", []) for cluster in clusters if cluster["name"] == face]
        return list(hosts)

    def _asked(self, path: str) -> str:
        command = ["curl", "-s", "-g", "-f", "-m", str(_ASK_S), f"http://{self.address}:{_ADMIN}{path}"]
        asked = subprocess.run(inside(self._client, command), capture_output=True, text=True)
        if asked.returncode:
            raise Stuck(f"the gateway does not answer: {self._pod.said()}")
        return asked.stdout


def write_hosts(directory: Path, hosts: Sequence[str]) -> None:
    """Envoy reads a list again where another file takes its place."""
    for face, port in FACES.items():
        endpoints = [
            {"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}} for host in hosts
        ]
        told = {"@type": _LIST, "cluster_name": face, "endpoints": [{"lb_endpoints": endpoints}]}
        new = directory / f"{face}.new"
        new.write_text(json.dumps({"resources": [told]}), encoding="utf-8")
        os.replace(new, directory / f"{face}.json")


def _address(host: dict[str, Any]) -> str:
    return str(host["address"]["socket_address"]["address"])


def _number(host: dict[str, Any], name: str) -> int:
    [stat] = [stat for stat in host["stats"] if stat["name"] == name]
    return int(stat.get("value", 0))
