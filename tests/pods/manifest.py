"""What KubeRay makes of our RayService manifest: each pod's environment, command and probe, and what Serve is sent.

The manifest for GPUs, since it is the one for several hosts; `for_two_small_hosts` says all that is changed in it. A
host there is a routers' pod and a cells' pod in one.
"""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
_FILE = CHECKOUT / "deploy" / "kuberay" / "rayservice.yaml"
_GPU = "nvidia.com/gpu"
_OBJECT_STORE_BYTES = 128 * 2**20
# A cell that is drained without room for another may go on for 5 s: the node's time less the cell's.
_NODE_DRAIN_S, _CELL_DRAIN_S, _GRACE_S = 65, 60, 90
_ROUTERS_ON_A_HOST = 8
# Ray takes a node for dead after 65 s of silence. These make it some 20.
_SOONER_DEAD = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000"}
_SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"checkpoint": "demo", "dtype": "float32", "max_sequence_length": 2048},
    # Ray counts a GPU for each cell, as it does there, so a pod holds one cell. Nothing touches a GPU.
    # Nothing is recorded, as on GPUs: it would take each cell that starts seconds of the cores.
    "cell": {"placement": "colocated", "device": "cpu", "gpus_per_tower": 1, "max_sequences": 16, "capture": "off"},
    # As where every GPU is taken: a change has no room for another cell beside the old ones.
    "cluster": {"min_cells": 2, "max_cells": 2, "surge": False, "drain_timeout_s": _CELL_DRAIN_S},
}

Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Group:
    """The pods of one kind. `command`: without the addresses, which are a pod's own."""

    environment: dict[str, str]
    command: str
    shared_memory: str
    grace_s: float
    probe: list[str]
    probe_s: float


class Manifest:
    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec

    @classmethod
    def for_two_small_hosts(cls) -> "Manifest":
        """Ours, for a cell of the demo on each of two hosts without GPUs, with less patience."""
        documents = yaml.safe_load_all(_FILE.read_text(encoding="utf-8"))
        [spec] = [document["spec"] for document in documents if document["kind"] == "RayService"]
        cluster = spec["rayClusterConfig"]
        groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
        head, worker = cluster["headGroupSpec"], groups["cells"]
        cluster["workerGroupSpecs"] = [worker]
        _take_routers(worker, groups["routers"])
        for group in (head, worker):
            group["rayStartParams"] |= {"object-store-memory": str(_OBJECT_STORE_BYTES)}
            group["template"]["spec"]["terminationGracePeriodSeconds"] = _GRACE_S
            _set(_container(group), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", str(_NODE_DRAIN_S))
        for name, value in _SOONER_DEAD.items():
            _set(_container(head), name, value)
        _container(worker)["resources"]["limits"] |= {"cpu": "2", "memory": "4Gi", _GPU: 1}
        [volume] = [v for v in worker["template"]["spec"]["volumes"] if v["name"] == "shared-memory"]
        volume["emptyDir"]["sizeLimit"] = "512Mi"
        return cls(spec)

    @property
    def head(self) -> Group:
        return _group(self._spec["rayClusterConfig"]["headGroupSpec"], "--head")

    @property
    def worker(self) -> Group:
        [worker] = self._spec["rayClusterConfig"]["workerGroupSpecs"]
        return _group(worker, "")

    def serve_config(self, changes: Settings) -> str:
        """`serveConfigV2` as KubeRay puts it, with these settings changed."""
        config = yaml.safe_load(self._spec["serveConfigV2"])
        [application] = config["applications"]
        for settings in (_SETTINGS, changes):
            for section, values in settings.items():
                application["args"][section] = application["args"].get(section, {}) | values
        return json.dumps(config)


def _take_routers(worker: dict[str, Any], routers: dict[str, Any]) -> None:
    """Its probe is theirs. It has room for all of them: nobody brings pods for more."""
    assert _container(worker)["env"] == _container(routers)["env"]
    _container(worker)["readinessProbe"] = _container(routers)["readinessProbe"]
    room = {name: _ROUTERS_ON_A_HOST for name in routers["resources"] if name != "CPU"}
    worker["rayStartParams"] |= {"resources": f"'{json.dumps(room)}'"}


def _group(group: dict[str, Any], kind: str) -> Group:
    pod, container = group["template"]["spec"], _container(group)
    volumes = {volume["name"]: volume.get("emptyDir", {}) for volume in pod.get("volumes", [])}
    memory = volumes.get("shared-memory", {}).get("sizeLimit", "512Mi").removesuffix("i").lower()
    probe = container.get("readinessProbe", {"exec": {"command": ["false"]}, "timeoutSeconds": 1})
    return Group(
        environment={variable["name"]: variable["value"] for variable in container["env"]},
        command=_command(group["rayStartParams"], container["resources"]["limits"], kind),
        shared_memory=memory,
        grace_s=pod["terminationGracePeriodSeconds"],
        probe=probe["exec"]["command"],
        probe_s=probe["timeoutSeconds"],
    )


def _command(given: dict[str, str], limits: Mapping[str, Any], kind: str) -> str:
    """KubeRay tells Ray the limits of the container, and what it needs itself."""
    options = {"num-cpus": limits["cpu"], "memory": str(_bytes(limits["memory"]))}
    if _GPU in limits:
        options["num-gpus"] = str(limits[_GPU])
    options |= {"metrics-export-port": "8080", "dashboard-agent-listen-port": "52365"} | given
    told = " ".join(f"--{name}={value}" for name, value in options.items())
    return f"ulimit -n 65536; ray start {kind} --block {told}"


def _bytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi")) * 2**30


def _container(group: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any]
    [container] = group["template"]["spec"]["containers"]
    return container


def _set(container: dict[str, Any], name: str, value: str) -> None:
    """Head and workers have one list in the file; each gets its own."""
    others = [variable for variable in container["env"] if variable["name"] != name]
    container["env"] = [*deepcopy(others), {"name": name, "value": value}]
