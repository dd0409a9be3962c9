"""A network of hosts with clients on one of them: what Ray clusters are started on."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.pods_parts.clients import Clients
from benchmarks.pods_parts.faces import ACCESS
from benchmarks.pods_parts.manifest import CHECKOUT
from benchmarks.pods_parts.network import Network, Pod
from benchmarks.pods_parts.secrets import Secrets

CLIENTS = 6
_REDIS = "exec redis-server --bind 0.0.0.0 --protected-mode no --save '' --appendonly no --dir /tmp/ray"
REDIS_PORT = 6379
# Of every pod: this environment's programs, the system's, and what `make deploy-env` brings.
PATH = os.pathsep.join(
    [
        str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin",
        str(CHECKOUT / ".venv-deploy" / "bin"),
    ]
)  # fmt: skip


class Site:
    """`client`: the namespace of the clients, from which one also looks at the clusters. `secrets`: of all clusters."""

    def __init__(self, directory: Path, other: Path | None = None) -> None:
        """`other`: a second checkpoint that may answer the clients."""
        self.directory, self.network = directory, Network()
        try:
            self.secrets = Secrets(directory / "secrets")
            self.client, _ = self.network.join("client")
            given = environment(directory) | {ACCESS: self.secrets.access().written()}
            self.load = Clients(self.client, CLIENTS, directory, given, other)
        except BaseException:
            self.network.close()
            raise
        self._others: list[Pod] = []

    def start_redis(self) -> str:
        """Its address. As somebody else runs one: without a password, and nothing on disk."""
        pod = self.pod("redis")
        pod.start(_REDIS)
        return f"{pod.address}:{REDIS_PORT}"

    def pod(self, name: str) -> Pod:
        """One of no Ray cluster, not started yet. It ends with the site."""
        directory = self.directory / name
        pod = Pod(self.network, name, directory, "1m", environment(directory))
        self._others.append(pod)
        return pod

    def close(self) -> None:
        with ExitStack() as stack:  # whatever fails, the others end too
            stack.callback(self.network.close)
            for pod in self._others:
                stack.callback(pod.remove)
            stack.callback(self.load.close)


@contextmanager
def site(directory: Path, other: Path | None = None) -> Iterator[Site]:
    made = Site(directory, other)
    try:
        yield made
    finally:
        made.close()


def environment(home: Path) -> dict[str, str]:
    """What an image gives, and that no host's processes yield to another's."""
    given = {"PATH": PATH, "HOME": str(home), "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"}
    return given | {"RAY_worker_niceness": "0"}
