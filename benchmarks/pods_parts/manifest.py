"""What KubeRay makes of our RayService manifest: each pod's environment, command and probe, and what Serve is sent.

The manifest for GPUs, since it is the one for several hosts, with keys and TLS; `for_two_small_hosts` says all that is
changed in it. A host there is a routers' pod and a cells' pod in one.
"""

import json
import uuid
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
_FILE = CHECKOUT / "deploy" / "kuberay" / "rayservice-protected.yaml"
_GPU = "nvidia.com/gpu"
_OBJECT_STORE_BYTES = 128 * 2**20
# A node's drain takes 5 s more than a cell's: what a cell that is drained without room for another has left.
_CELL_DRAIN_S, _NODE_DRAIN_S, _GRACE_S = 60, 5, 25  # the second beyond the first, the third beyond both
_HEAD_LONGER_S = 10  # than workers, which end at once without it
_ROUTERS_ON_A_HOST = 8  # as many as a change of settings takes, with a drain before it: no autoscaler brings pods
# Ray takes a node for dead after 65 s of silence. These make it some 20.
_SOONER_DEAD = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000"}
_SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"checkpoint": "demo", "dtype": "float32", "max_sequence_length": 2048},
    # Ray counts a GPU for each cell, as it does there, so a pod holds one cell. Nothing touches a GPU.
    # Nothing is recorded, as on GPUs: it would take each cell that starts seconds of the cores.
    "cell": {"placement": "colocated", "device": "cpu", "gpus_per_tower": 1, "max_sequences": 16, "capture": "off"},
    # As where every GPU is taken: a change has no room for another cell beside the old ones.
    "cluster": {"min_cells": 2, "max_cells": 2, "surge": False},
}
# KubeRay gives a worker so long to find the GCS again, where that has a Redis.
_RECONNECT_S = 600

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
    def __init__(self, spec: dict[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> None:
        """`settings`: what is changed in those of the file."""
        self._spec, self._settings = spec, settings

    @classmethod
    def for_two_small_hosts(
        cls,
        secrets: Path,
        redis: str = "",
        spare: bool = False,
        cell_drain_s: int = _CELL_DRAIN_S,
        routers_on_a_host: int = _ROUTERS_ON_A_HOST,
    ) -> "Manifest":
        """Ours, for a cell of the demo on each of two hosts without GPUs, with less patience.

        `secrets`: where a directory lies for each of its Secrets. Settings name it in place of the mount: the hosts of
        the bench have one disk. `redis`: the address of one, as `redis.address` of the chart. `spare`: each host has
        room for another cell, and new ones start before old ones go, as in the chart's own values.
        `routers_on_a_host`: 1, as a routers' pod of the chart, where no settings change.
        """
        documents = yaml.safe_load_all(_FILE.read_text(encoding="utf-8"))
        [spec] = [document["spec"] for document in documents if document["kind"] == "RayService"]
        cluster = spec["rayClusterConfig"]
        groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
        head, worker = cluster["headGroupSpec"], groups["cells"]
        cluster["workerGroupSpecs"] = [worker]
        _take_routers(worker, groups["routers"], routers_on_a_host)
        spec["serveConfigV2"] = _unmounted(spec["serveConfigV2"], worker, secrets)
        node_drain_s = cell_drain_s + _NODE_DRAIN_S
        for group, drain_s in ((head, node_drain_s + _HEAD_LONGER_S), (worker, node_drain_s)):
            group["rayStartParams"] |= {"object-store-memory": str(_OBJECT_STORE_BYTES)}
            group["template"]["spec"]["terminationGracePeriodSeconds"] = drain_s + _GRACE_S
            _set(_container(group), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", str(drain_s))
        for name, value in _SOONER_DEAD.items():
            _set(_container(head), name, value)
        _container(worker)["resources"]["limits"] |= {"cpu": "2", "memory": "4Gi", _GPU: 2 if spare else 1}
        [volume] = [v for v in worker["template"]["spec"]["volumes"] if v["name"] == "shared-memory"]
        volume["emptyDir"]["sizeLimit"] = "512Mi"
        if redis:
            cluster["gcsFaultToleranceOptions"] = {"redisAddress": redis}
        settings = _SETTINGS | {"cluster": {**_SETTINGS["cluster"], "surge": spare, "drain_timeout_s": cell_drain_s}}
        return cls(spec, settings)

    @property
    def head(self) -> Group:
        """KubeRay names the Redis to the head alone, and a namespace in it that no other cluster has."""
        cluster = self._spec["rayClusterConfig"]
        head = _group(cluster["headGroupSpec"], "--head")
        if "gcsFaultToleranceOptions" in cluster:
            head.environment["RAY_REDIS_ADDRESS"] = cluster["gcsFaultToleranceOptions"]["redisAddress"]
            head.environment["RAY_external_storage_namespace"] = str(uuid.uuid5(uuid.NAMESPACE_OID, "the cluster"))
        return head

    @property
    def worker(self) -> Group:
        cluster = self._spec["rayClusterConfig"]
        [group] = cluster["workerGroupSpecs"]
        worker = _group(group, "")
        if "gcsFaultToleranceOptions" in cluster:
            worker.environment.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(_RECONNECT_S))
        return worker

    def serve_config(self, changes: Settings) -> str:
        """`serveConfigV2` as KubeRay puts it, with these settings changed."""
        config = yaml.safe_load(self._spec["serveConfigV2"])
        [application] = config["applications"]
        for settings in (self._settings, changes):
            for section, values in settings.items():
                application["args"][section] = application["args"].get(section, {}) | values
        return json.dumps(config)


def _take_routers(worker: dict[str, Any], routers: dict[str, Any], most: int) -> None:
    """Its probe and its files are theirs, and it has room for so many."""
    assert _container(worker)["env"] == _container(routers)["env"]
    _container(worker)["readinessProbe"] = _container(routers)["readinessProbe"]
    shared = _container(worker)["volumeMounts"]
    _container(worker)["volumeMounts"] = [*shared, *(m for m in _container(routers)["volumeMounts"] if m not in shared)]
    pod, theirs = worker["template"]["spec"], routers["template"]["spec"]
    pod["volumes"] = [*pod["volumes"], *(volume for volume in theirs["volumes"] if volume not in pod["volumes"])]
    room = {name: most for name in routers["resources"] if name != "CPU"}
    worker["rayStartParams"] |= {"resources": f"'{json.dumps(room)}'"}


def _unmounted(config: str, group: dict[str, Any], secrets: Path) -> str:
    """The same, with each file of a Secret where it lies, not where this group's pods mount it."""
    volumes = group["template"]["spec"]["volumes"]
    names = {volume["name"]: volume["secret"]["secretName"] for volume in volumes if "secret" in volume}
    for mount in _container(group)["volumeMounts"]:
        if mount["name"] in names:
            config = config.replace(f"{mount['mountPath']}/", f"{secrets / names[mount['name']]}/")
    return config


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
