"""The Secrets of our manifest, made for one run. They hold certificates of the service, of a gateway and of clients,
and a file of keys with the hash of a client's key. Each Secret is a directory, as the kubelet mounts it.
"""

import os
import shutil
from itertools import count
from pathlib import Path

from benchmarks.chaos_parts.access import Access
from benchmarks.pods_parts.certificates import signed
from cluster.runs.keys import KeyEntry, hash_of, new_key
from twotower_client import Tls

SERVICE = "twotower-serve-svc.default.svc"  # the name of the manifest's Service
GATEWAY = "models.example"
_TLS, _KEYS, _CLIENT_CA = "twotower-tls", "twotower-keys", "twotower-client-ca"  # as the manifest calls them


class Secrets:
    """`directory` has one for each Secret. `shown`: the fingerprint of the certificate that lies there now."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._versions = count(1)
        self._own = directory / "clients"
        self._own.mkdir(parents=True)
        self._servers, self._clients = signed("the service's authority"), signed("the clients' authority")
        self._key = new_key()
        entry = KeyEntry(name="bench", sha256=hash_of(self._key))
        self._put(_KEYS, {"keys.yaml": b"keys:\n" + entry.written().encode()})
        self._put(_CLIENT_CA, {"ca.crt": self._clients.pem})
        client = signed("a client", self._clients)
        for name, content in (("ca.crt", self._servers.pem), ("tls.crt", client.pem), ("tls.key", client.key)):
            _write(self._own / name, content)
        self.shown = ""
        self.renew()

    def renew(self) -> None:
        """Another certificate of the service takes the place of the one there, with another key, by the same issuer."""
        made = signed(SERVICE, self._servers, is_host=True)
        self._put(_TLS, {"tls.crt": made.pem, "tls.key": made.key})
        self.shown = made.fingerprint

    def access(self, name: str = SERVICE) -> Access:
        """What a client shows and believes. `name`: whose certificate it wants to see."""
        own = self._own
        return Access(self._key, Tls(own / "ca.crt", own / "tls.crt", own / "tls.key", server_name=name))

    def write_gateways(self, directory: Path) -> None:
        """What lies on a gateway's host: its own certificate, one that it shows to the service, and both issuers'."""
        server, client = signed(GATEWAY, self._servers, is_host=True), signed("the gateway", self._clients)
        contents = {"tls.crt": server.pem, "tls.key": server.key, "client.crt": client.pem, "client.key": client.key}
        for name, content in (contents | {"ca.crt": self._servers.pem, "client-ca.crt": self._clients.pem}).items():
            _write(directory / name, content)

    def _put(self, secret: str, contents: dict[str, bytes]) -> None:
        """As the kubelet: files are links into a link to a directory, which is exchanged whole."""
        mounted = self.directory / secret
        mounted.mkdir(exist_ok=True)
        data = mounted / "..data"
        before = data.resolve() if data.exists() else None
        version = mounted / f"..{next(self._versions)}"
        version.mkdir()
        for name, content in contents.items():
            _write(version / name, content)
            if before is None:
                (mounted / name).symlink_to(Path("..data", name))
        new = mounted / "..data_tmp"
        new.symlink_to(version.name)
        os.replace(new, data)
        if before is not None:
            shutil.rmtree(before)


def _write(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)
