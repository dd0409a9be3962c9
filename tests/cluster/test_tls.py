"""TLS on both faces, and our own commands over it."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from ray.serve._private.http_util import start_asgi_http_server
from ray.serve.config import HTTPOptions

from cluster.certificates import Files, rereading
from cluster.cli import asking, tls
from cluster.cli.status import Snapshots
from cluster.cli.up import _what_next
from cluster.config import ServiceConfig
from cluster.faces.grpc.service import GrpcServer
from cluster.faces.http import proxy_answers
from cluster.faces.http.service import make_app
from cluster.http_options import TLS, check_same, http_options
from cluster.ops import run_state
from cluster.ops.run_state import RunState
from tests.certificates import NAME, Family, drawn, family
from tests.cluster.fakes import ScriptedCells, all_modes, generation
from twotower.errors import ConfigError, Unavailable
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc
from twotower_client import KEY_VARIABLE, AsyncClient

SOME, OTHER = family(), family(1)
ASKED = pb.GetModelInfoRequest()


class Face:
    """A gRPC server with certificates of these files."""

    def __init__(self, settings: dict[str, str]) -> None:
        files = Files.of(ServiceConfig.parse({"ingress": settings}).ingress)
        assert files is not None
        self.certificates = rereading(files)
        self.server = GrpcServer(generation(ScriptedCells()), "127.0.0.1", 0, certificates=self.certificates)
        self.address = f"127.0.0.1:{self.server.port}"

    def channel(self, known: Family, with_own: bool = True) -> grpc.aio.Channel:
        own = (known.client.key, known.client.pem + known.middle.pem) if with_own else ()
        return grpc.aio.secure_channel(self.address, grpc.ssl_channel_credentials(known.root.pem, *own))


@asynccontextmanager
async def serving(settings: dict[str, str]) -> AsyncIterator[Face]:
    face = Face(settings)
    await face.server.start()
    try:
        yield face
    finally:
        await face.server.stop(0)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Without certificates of clients."""
    return {name: path for name, path in SOME.files(tmp_path).items() if name != "grpc_client_ca_file"}


@pytest.fixture(autouse=True)
def runtime(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No notes, and no variables."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
    for name in (tls.CA_VARIABLE, tls.CERT_VARIABLE, tls.KEY_VARIABLE, KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)


async def info_of(channel: grpc.aio.Channel) -> str:
    return str((await pb_grpc.GenerationServiceStub(channel).GetModelInfo(ASKED, timeout=10)).model_name)


async def refusal_of(channel: grpc.aio.Channel) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await info_of(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return str(caught.value.details())


async def test_grpc_over_tls_is_for_those_who_trust_it(files: dict[str, str]) -> None:
    async with serving(files) as face:
        async with face.channel(SOME, with_own=False) as channel:
            assert await info_of(channel) == "fake"
        async with face.channel(OTHER, with_own=False) as channel:
            assert "CERTIFICATE_VERIFY_FAILED" in await refusal_of(channel)
        async with grpc.aio.insecure_channel(face.address) as channel:
            assert "Socket closed" in await refusal_of(channel)


async def test_grpc_wants_clients_certificates_where_it_is_told_so(tmp_path: Path) -> None:
    async with serving(SOME.files(tmp_path)) as face:
        async with face.channel(SOME) as channel:
            assert await info_of(channel) == "fake"
        async with face.channel(SOME, with_own=False) as channel:
            await refusal_of(channel)
        stranger = drawn("stranger")
        shown = grpc.ssl_channel_credentials(SOME.root.pem, stranger.key, stranger.pem)
        async with grpc.aio.secure_channel(face.address, shown) as channel:
            await refusal_of(channel)


async def test_grpc_shows_new_certificates_to_new_connections(tmp_path: Path) -> None:
    settings = SOME.files(tmp_path)
    async with serving(settings) as face, face.channel(SOME) as before:
        assert await info_of(before) == "fake"
        OTHER.files(tmp_path)
        face.certificates.look()
        async with face.channel(OTHER) as channel:
            assert await info_of(channel) == "fake"
        assert await info_of(before) == "fake", "it stands"
        async with face.channel(SOME) as channel:
            await refusal_of(channel)


async def test_broken_files_change_nothing(files: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    async with serving(files) as face:
        Path(files["tls_key_file"]).write_bytes(OTHER.server.key)
        for _ in range(3):
            face.certificates.look()
        async with face.channel(SOME, with_own=False) as channel:
            assert await info_of(channel) == "fake"
        told = [record.getMessage() for record in caplog.records if "of before stay" in record.getMessage()]
        assert len(told) == 1 and "does not belong to the certificate" in told[0]
        Path(files["tls_cert_file"]).write_bytes(OTHER.chain)
        face.certificates.look()
        async with face.channel(OTHER, with_own=False) as channel:
            assert await info_of(channel) == "fake"


async def test_our_commands_trust_what_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "root").write_bytes(SOME.root.pem)
    (tmp_path / "own").write_bytes(SOME.client.pem + SOME.middle.pem)
    (tmp_path / "own key").write_bytes(SOME.client.key)
    async with serving(SOME.files(tmp_path)) as face:

        async def told() -> str:
            return str((await asyncio.to_thread(asking.model_info, face.address)).name)

        with pytest.raises(Unavailable, match=r"does it speak TLS\? TWOTOWER_TLS_CA names"):
            await told()
        monkeypatch.setenv(tls.CA_VARIABLE, str(tmp_path / "root"))
        with pytest.raises(Unavailable, match="TWOTOWER_TLS_CERT and TWOTOWER_TLS_KEY our own"):
            await told()
        monkeypatch.setenv(tls.CERT_VARIABLE, str(tmp_path / "own"))
        with pytest.raises(ConfigError, match="TWOTOWER_TLS_CERT and TWOTOWER_TLS_KEY: got one of them"):
            await told()
        monkeypatch.setenv(tls.KEY_VARIABLE, str(tmp_path / "own key"))
        assert await told() == "fake"
        await asyncio.to_thread(asking.generate, face.address, "Hi", {"timeout_s": 20.0}, False)
        url, trust = tls.grpc_target(face.address)
        async with AsyncClient(url, tls=trust) as one:
            assert (await one.model()).name == "fake"
        monkeypatch.setenv(tls.CA_VARIABLE, str(tmp_path / "own key"))
        with pytest.raises(ConfigError, match=r"TWOTOWER_TLS_CA: .* wanted certificates in PEM"):
            await told()
        monkeypatch.setenv(tls.CA_VARIABLE, str(tmp_path / "none"))
        with pytest.raises(ConfigError, match=r"TWOTOWER_TLS_CA: .* cannot be read: No such file"):
            await told()
    assert "good things" in capsys.readouterr().out


def note(http: str, grpc_address: str, cert_file: str | None) -> RunState:
    state = RunState(os.getpid(), run_state.start_tick(os.getpid()), http, grpc_address, "demo", cert_file=cert_file)
    run_state.write(int(http.rpartition(":")[2]), state)
    return state


@pytest.mark.parametrize("host", [NAME, "*.serving.example", "10.1.2.3"])
async def test_ones_own_service_is_known_by_its_certificate(host: str, files: dict[str, str]) -> None:
    """Whatever name it is for."""
    other_name = drawn("server", SOME.middle, hosts=(host,))
    Path(files["tls_cert_file"]).write_bytes(other_name.pem + SOME.middle.pem)
    Path(files["tls_key_file"]).write_bytes(other_name.key)
    async with serving(files) as face:
        note("127.0.0.1:1", face.address, files["tls_cert_file"])
        assert (await asyncio.to_thread(asking.model_info, face.address)).name == "fake"
        Path(files["tls_cert_file"]).write_bytes(SOME.chain)
        with pytest.raises(Unavailable, match="does it speak TLS"):
            await asyncio.to_thread(asking.model_info, face.address)


@asynccontextmanager
async def http_face(settings: dict[str, str], app: Any) -> AsyncIterator[str]:
    """As Serve's proxies start theirs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ingress = ServiceConfig.parse({"ingress": settings | {"http_port": port}}).ingress
    options = HTTPOptions(**http_options(ingress))
    options.middlewares.extend(proxy_answers.middlewares())
    running, server = await start_asgi_http_server(app, options, event_loop=asyncio.get_running_loop())
    try:
        async with asyncio.timeout(10):
            while not server.started:
                await asyncio.sleep(0.01)
        yield f"127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await running


async def test_http_over_tls(files: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    app: Callable[..., Any] = make_app(generation(ScriptedCells()), all_modes)
    (tmp_path / "root").write_bytes(SOME.root.pem)
    monkeypatch.setenv(tls.CA_VARIABLE, str(tmp_path / "root"))
    async with http_face(files, app) as address:

        def status() -> int:
            request = tls.urllib.request.Request(f"{tls.url(address)}/version")
            with tls.opened(request, address, 10) as response:
                return int(response.status)

        assert await asyncio.to_thread(asking.is_ready, address, 10.0, True)
        assert not await asyncio.to_thread(asking.is_ready, address, 10.0)
        with (
            monkeypatch.context() as without,
            pytest.raises(Unavailable, match="if it speaks TLS, set TWOTOWER_TLS_CA"),
        ):
            without.delenv(tls.CA_VARIABLE)
            await asyncio.to_thread(Snapshots(address).next)
        assert await asyncio.to_thread(status) == 200
        (tmp_path / "root").write_bytes(OTHER.root.pem)
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            await asyncio.to_thread(status)
        monkeypatch.delenv(tls.CA_VARIABLE)
        note(address, "127.0.0.1:1", files["tls_cert_file"])
        assert await asyncio.to_thread(status) == 200
        assert await asyncio.to_thread(asking.is_ready, address, 10.0, True)


def test_serve_has_to_be_told_the_same(files: dict[str, str]) -> None:
    """Or HTTP would be plain where the settings say otherwise."""
    ingress, plain = (ServiceConfig.parse({"ingress": settings}).ingress for settings in (files, {}))
    check_same(HTTPOptions(**http_options(ingress)), ingress)
    check_same(HTTPOptions(**http_options(plain)), plain)
    with pytest.raises(
        ConfigError, match=r"ingress.tls_cert_file: got /.*, wanted None, which is http_options.ssl_cert"
    ):
        check_same(HTTPOptions(**http_options(plain)), ingress, TLS)
    with pytest.raises(ConfigError, match=r"ingress.tls_cert_file: got None, wanted /"):
        check_same(HTTPOptions(**http_options(ingress)), plain)
    elsewhere = SimpleNamespace(**http_options(plain) | {"port": 1})
    check_same(elsewhere, plain, TLS)
    with pytest.raises(ConfigError, match=r"ingress.http_port: got 8000, wanted 1"):
        check_same(elsewhere, plain)


def test_what_up_says(files: dict[str, str]) -> None:
    state = RunState(4711, 1, "127.0.0.1:8000", "127.0.0.1:50051", "demo", cert_file=files["tls_cert_file"])
    said = _what_next(state, "Hi", [], keys=False)
    assert "answers on https://127.0.0.1:8000 (OpenAI's API)" in said
    assert f"curl --cacert {files['tls_cert_file']} --connect-to ::127.0.0.1:8000 https://{NAME}/v1/comp" in said
