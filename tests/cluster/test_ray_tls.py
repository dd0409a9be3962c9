"""A whole service where Ray speaks TLS: it answers, and who shows no certificate is let in nowhere but at the faces.

Without TLS are Ray's HTTP ports, which ask for its token or tell metrics, and what torch opens on loopback.
"""

import asyncio
import os
import socket
import ssl
from pathlib import Path

import psutil
import pytest

from benchmarks.reference.service import free_port
from cluster.runs import line_tls
from tests.certificates import drawn
from tests.cluster.listening import Port, ports_of, said_by
from tests.cluster.up_process import UpProcess

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(300)]
ADDRESSES = ("localhost", "127.0.0.1", "127.0.0.2")  # those of a Ray that `up` has started
NO_TLS, LETS_IN, WANTS_ONE = "no TLS", "lets in", "wants a certificate"


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
        heard = {port: _heard(port, root.pem) for port in ports}
        plain = asyncio.run(_without_tls([port for port in ports if heard[port] == NO_TLS]))
    finally:
        up.stop()
    assert LETS_IN not in heard.values(), heard
    closed = {port.process.split(".")[0] for port in ports if heard[port] == WANTS_ONE}
    wanted = {"gcs_server", "raylet", "ray::ServeReplica:twotower:Router", "ray::ServeReplica:twotower:Cell"}
    assert wanted <= {name.split()[0] for name in closed}, closed
    assert set(plain.values()) <= {"HTTP 401", "HTTP 200 metrics", "nothing", "gone"}, plain
    mute = [port for port, said in plain.items() if said == "nothing"]
    assert all(port.is_towers for port in mute), "only what torch opens on loopback says nothing"


def _heard(port: Port, root: bytes) -> str:
    """What a port makes of somebody who speaks TLS and shows no certificate. With TLS 1.3 it says so after the
    handshake."""
    context = ssl.create_default_context(cadata=root.decode())
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((port.at, port.port), 5) as plain:
            plain.settimeout(5)
            with context.wrap_socket(plain, server_hostname="localhost") as tls:
                try:
                    tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
                    return LETS_IN if tls.recv(1) else WANTS_ONE
                except ssl.SSLError as error:
                    return WANTS_ONE if "CERTIFICATE_REQUIRED" in str(error) else f"{error}"
    except OSError:  # of which ssl.SSLError is one
        return NO_TLS


async def _without_tls(ports: list[Port]) -> dict[Port, str]:
    return dict(zip(ports, await asyncio.gather(*map(said_by, ports)), strict=True))
