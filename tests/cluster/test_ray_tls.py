"""A whole service where Ray speaks TLS: it answers, and who shows no certificate is let in nowhere but at the faces."""

import os
import socket
import ssl
from pathlib import Path

import psutil
import pytest

from benchmarks.reference.service import free_port
from cluster.runs import line_tls
from tests.certificates import drawn
from tests.cluster.listening import Port, ports_of
from tests.cluster.up_process import UpProcess

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(300)]
ADDRESSES = ("localhost", "127.0.0.1", "127.0.0.2")  # those of a Ray that `up` has started


def test_a_service_over_rays_tls(tmp_path: Path) -> None:
    root = drawn("root of Ray", is_ca=True)
    node = drawn("node", root, hosts=ADDRESSES)
    variables = {line_tls.SWITCH: "1"}
    for name, content in zip(line_tls.FILES, (node.pem, node.key, root.pem), strict=True):
        (tmp_path / name).write_bytes(content)
        variables[name] = str(tmp_path / name)
    settings = ("cell.placement=split", "cell.device=cpu", "cell.max_sequences=4")
    up = UpProcess(free_port(), free_port(), *settings, environment=os.environ | variables)
    try:
        up.wait_until_ready()
        assert len(up.ask()["choices"][0]["token_ids"]) == 20
        ports = [port for port in ports_of(psutil.Process(up.process.pid)) if port.port not in (up.http, up.grpc)]
        spoken = {port for port in ports if _speaks_tls(port, root.pem)}
    finally:
        up.stop()
    of_processes = {port.process.split(".")[0] for port in spoken}
    assert any("gcs_server" in name for name in of_processes), of_processes
    assert any("raylet" in name for name in of_processes), of_processes
    for replica in ("Router", "Cell"):
        assert any(name.startswith(f"ray::ServeReplica:twotower:{replica}") for name in of_processes), of_processes


def _speaks_tls(port: Port, root: bytes) -> bool:
    """Whether it shows a certificate of this root. What it makes of our showing none comes after the handshake."""
    context = ssl.create_default_context(cadata=root.decode())
    context.set_alpn_protocols(["h2"])
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    try:
        with socket.create_connection((port.at, port.port), 5) as plain:
            plain.settimeout(5)
            with context.wrap_socket(plain, server_hostname="localhost"):
                return True
    except (OSError, ssl.SSLError):
        return False
