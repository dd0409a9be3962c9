"""What the pod bench asks as a stranger, of both faces in this process: it sees what is refused, and what is not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks.pods_parts import stranger
from benchmarks.pods_parts.secrets import GATEWAY, Secrets
from benchmarks.pods_parts.strangers import WANTED
from cluster.certificates import Files, rereading
from cluster.config import ServiceConfig
from cluster.faces.grpc.service import GrpcServer
from tests.cluster.test_keys import Guarded
from tests.cluster.test_tls import http_face


@asynccontextmanager
async def protected(secrets: Secrets, monkeypatch: pytest.MonkeyPatch, **more: str) -> AsyncIterator[None]:
    tls = secrets.directory / "twotower-tls"
    shown = {"tls_cert_file": str(tls / "tls.crt"), "tls_key_file": str(tls / "tls.key")}
    files = Files.of(ServiceConfig.parse({"ingress": shown | more}).ingress)
    assert files is not None
    guarded = Guarded(secrets.directory / "twotower-keys" / "keys.yaml")
    server = GrpcServer(guarded.service, "127.0.0.1", 0, certificates=rereading(files))
    await server.start()
    async with http_face(shown, guarded.app) as http:
        monkeypatch.setattr(stranger, "HTTP_PORT", int(http.rpartition(":")[2]))
        monkeypatch.setattr(stranger, "GRPC_PORT", server.port)
        yield
    await server.stop(0)


async def test_a_protected_service_tells_strangers_what_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = Secrets(tmp_path)
    authority = str(tmp_path / "twotower-client-ca" / "ca.crt")
    async with protected(secrets, monkeypatch, grpc_client_ca_file=authority):
        assert await asyncio.to_thread(stranger.refused, "127.0.0.1", secrets.access()) == WANTED
        shown = await asyncio.to_thread(stranger.certificates, "127.0.0.1", secrets.access())
        assert shown == {"http": secrets.shown, "grpc": secrets.shown}
        with pytest.raises(OSError, match="Hostname mismatch"):
            await asyncio.to_thread(stranger.certificates, "127.0.0.1", secrets.access(GATEWAY))


async def test_who_wants_no_certificate_of_clients_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = Secrets(tmp_path)
    async with protected(secrets, monkeypatch):
        told = await asyncio.to_thread(stranger.refused, "127.0.0.1", secrets.access())
    wrong = {what: got for what, got in told.items() if got != WANTED[what]}
    assert wrong == {"gRPC, no certificate": "an answer", "gRPC, another authority's certificate": "an answer"}
