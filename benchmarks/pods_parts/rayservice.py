"""A RayService of ours on pods: what the operator does for it, and what one sees of it from outside."""

import json
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.pods_parts.clients import Clients, Stuck
from benchmarks.pods_parts.manifest import Manifest, Settings
from benchmarks.pods_parts.network import Pod, inside
from benchmarks.pods_parts.site import Site, environment, site
from benchmarks.pods_parts.strangers import shown

WORKERS = ("worker-a", "worker-b")
_DASHBOARD, _APPLICATIONS = 8265, "/api/serve/applications/"
_ASK_S, _PUT_S, _POLL_S = 10.0, 60.0, 0.5
_UP_S = 240.0
_CAME_UP, _WHOLE_LOG = "Ray runtime started", 10**7
_MOST_FAILED_STARTS = 3


class Silent(Exception):
    """The head does not say, or not now."""


class RayService:
    """A head and two workers, each on a host of its own. `hosts`: the addresses of workers by name. `waited`: what has
    been waited for, and how many seconds."""

    def __init__(self, manifest: Manifest, where: Site, name: str = "") -> None:
        """`name`: of the Ray cluster, where there is another beside it."""
        self.manifest, self.where, self._name = manifest, where, name
        self._directory = where.directory / (name or "cluster")
        self._directory.mkdir()
        self._token = secrets.token_hex(16)
        self.pods: dict[str, Pod] = {}
        self._ending: list[Pod] = []
        self._started = self._failed_starts = 0
        self._is_up = False
        self.waited: list[tuple[str, float]] = []

    @property
    def hosts(self) -> dict[str, str]:
        return {name: self.pods[name].address for name in WORKERS}

    @property
    def load(self) -> Clients:
        return self.where.load

    # What the operator does.

    def start(self) -> None:
        """Until there is a cell and a router on each host."""
        self._start_head()
        self.until(lambda: not self.replicas("Cell"), "the head's dashboard answers")
        for name in WORKERS:
            self.start_worker(name)
        self.until(lambda: self.living() == {"head", *WORKERS}, "Ray has all nodes")
        self.put({})
        self.until(self.is_whole, "a cell and a router on each host")
        self.until(lambda: all(map(self.is_ready, WORKERS)), "each host is ready")
        self._is_up = True
        self.load.wait_for_questions(_UP_S)

    def _start_head(self) -> None:
        self._start("head", self.manifest.head.command)

    def start_worker(self, name: str) -> None:
        """A pod of this name, in place of one that ends or has ended, at an address of its own."""
        self._start(name, f"{self.manifest.worker.command} --address={self.pods['head'].address}:6379")

    def _start(self, name: str, command: str) -> None:
        if name in self.pods:
            self._ending.append(self.pods.pop(name))
        group = self.manifest.head if name == "head" else self.manifest.worker
        self._started += 1
        directory = self._directory / f"{self._started}-{name}"
        directory.mkdir()
        given = group.environment | environment(directory)
        given |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}
        host = f"{self._name}{directory.name}"
        pod = self.pods[name] = Pod(self.where.network, host, directory, group.shared_memory, given)
        pod.start(f"{command} --node-ip-address={pod.address}")

    def _start_what_failed(self) -> None:
        """As Kubernetes does. A raylet gives up if its agents take 15 s to start, as they may on a busy machine. The
        head gives up if its server for Ray's clients takes 30 s. Once the service is up, what had come up ends on
        purpose.
        """
        ended = {name: pod for name, pod in self.pods.items() if pod.has_ended}
        failed = [n for n, pod in ended.items() if not self._is_up or _CAME_UP not in pod.said(_WHOLE_LOG)]
        for name in failed:
            self._failed_starts += 1
            if self._failed_starts > _MOST_FAILED_STARTS:
                raise Stuck(self.said())
            print(f"{name} has not come up: another is started", flush=True)
            self.pods[name].start_again() if name == "head" else self.start_worker(name)

    def spread(self, changes: Settings) -> None:
        """Until there is a cell and a router on each host. Where a pod has come back, that takes these changes."""
        if not self.is_whole():
            self.put(changes)
        self.until(self.is_whole, "a cell and a router on each host")

    def put(self, changes: Settings) -> None:
        """The application, with these settings changed."""
        self._ask_head(_APPLICATIONS, self.manifest.serve_config(changes), _PUT_S)

    # What happens to it.

    def cut(self, name: str) -> None:
        self.where.network.cut(self.pods[name].space)

    def heal(self, name: str) -> None:
        self.where.network.heal(self.pods[name].space)

    # What one sees of it.

    def status(self) -> dict[str, Any]:
        """Serve's own."""
        return json.loads(self._ask_head(_APPLICATIONS))  # type: ignore[no-any-return]

    def living(self) -> set[str]:
        """The pods that Ray takes for alive."""
        nodes = json.loads(self._ask_head("/api/v0/nodes"))["data"]["result"]["result"]
        alive = {node["node_ip"] for node in nodes if node["state"] == "ALIVE"}
        return {name for name, pod in self.pods.items() if pod.address in alive}

    def kill(self, name: str, title: str) -> None:
        """kill -9 of the processes of this pod that call themselves so."""
        found = self.pods[name].processes(title)
        if not found:
            raise Stuck(f"no {title} on {name}")
        for process in found:
            process.kill()

    def replicas(self, deployment: str) -> list[dict[str, Any]]:
        """What Serve says of each."""
        application = self.status()["applications"].get("twotower", {"deployments": {}})
        found = application["deployments"].get(deployment, {"replicas": []})
        return list(found["replicas"])

    def running(self, deployment: str) -> list[str]:
        """The hosts of its replicas, once all of them run."""
        replicas = self.replicas(deployment)
        if any(replica["state"] != "RUNNING" for replica in replicas):
            return []
        return sorted(replica["node_ip"] for replica in replicas)

    def is_whole(self) -> bool:
        hosts = sorted(self.hosts.values())
        return self.running("Cell") == hosts and self.running("Router") == hosts

    def is_ready(self, name: str) -> bool:
        """By the manifest's readiness probe."""
        group = self.manifest.worker
        return self.pods[name].run(group.probe, group.probe_s)

    def shows(self, fingerprint: str, faces: Sequence[str] = ("http", "grpc")) -> bool:
        """Whether new connections to each host see this certificate, on these faces."""
        return all(shown(self.where, host)[face] == fingerprint for host in self.hosts.values() for face in faces)

    def resumed(self) -> int:
        """How often a run has gone on elsewhere because its cell was gone."""
        return self._logged("goes on after")

    def handed_over(self) -> int:
        """How often a run has gone on elsewhere because its cell was to go."""
        return self._logged("hands over to")

    def _logged(self, words: str) -> int:
        """By the routers' logs, which outlive their pods."""
        logs = self._directory.glob("*/ray/session_*/logs/worker-*.err")
        return sum(log.read_text(errors="replace").count(words) for log in logs)

    def until(self, done: Callable[[], bool], what: str, within_s: float = _UP_S) -> None:
        began, why = time.monotonic(), ""
        while True:
            self._start_what_failed()
            try:
                if done():
                    break
            except Silent as error:
                why = f": {error}"
            if time.monotonic() > began + within_s:
                raise Stuck(f"not so within {within_s:g} s: {what}{why}\n{self.said()}")
            time.sleep(_POLL_S)
        took_s = time.monotonic() - began
        self.waited.append((what, took_s))
        print(f"{took_s:5.1f} s until {what}", flush=True)

    def said(self) -> str:
        try:
            told = json.dumps(_in_short(self.status()), indent=1)
        except Silent as error:
            told = str(error)
        return "\n".join([told, self.load.summary(), *(pod.said() for pod in self.pods.values())])

    def _ask_head(self, path: str, body: str | None = None, within_s: float = _ASK_S) -> str:
        """What its dashboard answers, asked from the clients' host. Raises Silent."""
        if "head" not in self.pods:
            raise Silent("the cluster is deleted")
        url = f"http://{self.pods['head'].address}:{_DASHBOARD}{path}"
        command = ["curl", "-s", "-m", f"{within_s:g}", "-w", "\n%{http_code}", url]
        command += ["-H", f"Authorization: Bearer {self._token}"]
        if body is not None:
            command += ["-X", "PUT", "-H", "Content-Type: application/json", "-d", body]
        asked = subprocess.run(inside(self.where.client, command), capture_output=True, text=True)
        text, _, code = asked.stdout.rpartition("\n")
        if code != "200":
            raise Silent(f"{path}: {code}: {text[:500]}")
        return text

    def terminate(self) -> list[Pod]:
        """SIGTERM to all pods at once, as when the cluster is deleted. They are no longer its own to start again."""
        ending = list(self.pods.values())
        for pod in ending:
            pod.terminate()
        self._ending += ending
        self.pods = {}
        return ending

    def close(self) -> None:
        with ExitStack() as stack:  # whatever fails, the others end too
            for pod in [*self._ending, *self.pods.values()]:
                stack.callback(pod.remove)


@contextmanager
def running(manifest: Manifest, where: Site, name: str = "") -> Iterator[RayService]:
    service = RayService(manifest, where, name)
    try:
        service.start()
        yield service
    finally:
        service.close()


@contextmanager
def running_rayservice(directory: Path) -> Iterator[RayService]:
    with site(directory) as where, running(Manifest.for_two_small_hosts(where.secrets.directory), where) as service:
        yield service


def _in_short(status: dict[str, Any]) -> dict[str, Any]:
    told = {}
    for name, application in status["applications"].items():
        replicas = {
            deployment: [f"{replica['state']} {replica.get('node_ip', 'nowhere')}" for replica in found["replicas"]]
            for deployment, found in application["deployments"].items()
        }
        told[name] = {"status": application["status"], "message": application["message"], **replicas}
    return told
