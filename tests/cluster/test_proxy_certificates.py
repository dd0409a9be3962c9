"""The certificate that Serve's HTTP proxy shows follows its files, and routers see which one that is."""

import asyncio
import http.client
import logging
import ssl
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.faces.http.proxy_certificates import ProxyCertificates
from cluster.watch.shown import ShownOverHttp
from tests.certificates import ENDS, NAME, Family, drawn, family
from tests.cluster.test_tls import http_face

SOME, OTHER = family(), family(1)
_WITHIN_S = 10.0


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {name: path for name, path in SOME.files(tmp_path).items() if name != "grpc_client_ca_file"}


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


class Connection:
    """A client that believes this family alone. Raises SSLError where another certificate is shown."""

    def __init__(self, address: str, known: Family) -> None:
        context = ssl.create_default_context(cadata=known.root.pem.decode())
        self._connection = http.client.HTTPSConnection(address, context=context, timeout=_WITHIN_S)

    async def ask(self) -> bytes:
        def asked() -> bytes:
            self._connection.request("GET", "/version")
            return self._connection.getresponse().read()

        return await asyncio.to_thread(asked)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


async def believes(address: str, known: Family) -> bool:
    with Connection(address, known) as connection:
        try:
            return await connection.ask() == b"ok"
        except ssl.SSLCertVerificationError:
            return False


async def until(address: str, known: Family) -> None:
    async with asyncio.timeout(_WITHIN_S):
        while not await believes(address, known):
            await asyncio.sleep(0.05)


async def test_new_connections_see_new_certificates_and_those_that_stand_go_on(
    files: dict[str, str], tmp_path: Path
) -> None:
    async with http_face(files, app) as address:
        with Connection(address, SOME) as stands:
            assert await stands.ask() == b"ok"
            OTHER.files(tmp_path)
            await until(address, OTHER)
            assert not await believes(address, SOME) and await stands.ask() == b"ok"


async def test_files_that_no_client_would_take_change_nothing(
    files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """A certificate without its key yet, as where somebody copies one file after the other."""
    caplog.set_level(logging.ERROR)
    certificate, key = Path(files["tls_cert_file"]), Path(files["tls_key_file"])
    async with http_face(files, app) as address:
        await until(address, SOME)
        certificate.write_bytes(OTHER.chain)
        async with asyncio.timeout(_WITHIN_S):
            while "certificates of HTTP of before stay" not in caplog.text:
                await asyncio.sleep(0.05)
        assert "does not belong to the certificate" in caplog.text and await believes(address, SOME)
        key.write_bytes(OTHER.server.key)
        await until(address, OTHER)


async def test_files_that_are_broken_when_the_proxy_looks_first(files: dict[str, str]) -> None:
    key = Path(files["tls_key_file"])
    async with http_face(files, app) as address:
        key.unlink()
        assert await believes(address, SOME), "the first request, by which the proxy looks"
        Path(files["tls_cert_file"]).write_bytes(OTHER.chain)
        assert await believes(address, SOME)
        key.write_bytes(OTHER.server.key)
        await until(address, OTHER)


async def test_another_uvicorn_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Requests are answered all the same, and it is told once."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    proxy = ProxyCertificates(app)
    for _ in range(2):
        await proxy({"type": "http", "path": "/version"}, None, send)  # type: ignore[arg-type]
    assert len(sent) == 4 and len(caplog.records) == 1
    assert "until it is started again: this uvicorn keeps its connections elsewhere" in caplog.text


async def test_a_proxy_without_tls_has_nothing_to_look_at(caplog: pytest.LogCaptureFixture) -> None:
    async with http_face({}, app) as address:

        def asked() -> bytes:
            connection = http.client.HTTPConnection(address, timeout=_WITHIN_S)
            connection.request("GET", "/version")
            body = connection.getresponse().read()
            connection.close()
            return body

        assert await asyncio.to_thread(asked) == b"ok"
    assert not [record for record in caplog.records if "certificate" in record.getMessage()]


async def test_a_router_sees_what_the_proxy_shows(files: dict[str, str]) -> None:
    """Not what the files say: the proxy may be behind."""
    async with http_face(files, app) as address:
        shown = ShownOverHttp("0.0.0.0", int(address.rpartition(":")[2]))
        await shown.look()
        assert shown.until == ENDS
        soon = drawn("server", SOME.middle, hosts=(NAME, "127.0.0.1"), ends=ENDS - timedelta(days=9))
        Path(files["tls_key_file"]).write_bytes(soon.key)
        Path(files["tls_cert_file"]).write_bytes(soon.pem + SOME.middle.pem)
        await shown.look()
        async with asyncio.timeout(_WITHIN_S):
            while shown.until != ENDS - timedelta(days=9):
                await asyncio.sleep(0.05)
                await shown.look()
    for _ in range(2):
        await shown.look()
        assert shown.until == ENDS - timedelta(days=9), "a proxy may be busy"
    await shown.look()
    assert shown.until is None


async def test_where_no_proxy_is_nothing_is_said() -> None:
    shown = ShownOverHttp("127.0.0.1", 1)
    await shown.look()
    assert shown.until is None
