"""Where a service is and how it is reached: URLs, keys, TLS."""

import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.faces.http.service import make_app
from tests.client.conftest import FACES, PROMPT_RETRIES, Asking, http_server, serving
from tests.cluster.fakes import ScriptedCells, all_modes, generation, grpc_server
from tests.cluster.test_http import TEXT
from twotower_client import (
    AsyncClient,
    Client,
    RetryPolicy,
    Tls,
    TlsMistake,
    Unauthenticated,
    Unavailable,
    tls_mistakes,
)
from twotower_client.errors import Details
from twotower_client.target import KEY_VARIABLE, Target, target_of
from twotower_client.tls_mistakes import explained, mistake


@pytest.mark.parametrize(
    ("url", "address", "path"),
    [
        ("grpc://127.0.0.1:50051", "127.0.0.1:50051", ""),
        ("grpc://host", "host:50051", ""),
        ("grpcs://host", "host:443", ""),
        ("http://host/", "host:80", ""),
        ("https://host/models/a/", "host:443", "/models/a"),
        ("http://[::1]:8000", "[::1]:8000", ""),
        ("grpc://[fe80::1%eth0]:9", "[fe80::1%eth0]:9", ""),
    ],
)
def test_urls(url: str, address: str, path: str) -> None:
    target = target_of(url)
    assert (target.address, target.path) == (address, path)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("127.0.0.1:50051", "wanted grpc://HOST:PORT"),
        ("ftp://host", "wanted grpc://HOST:PORT"),
        ("grpc://", "wanted grpc://HOST:PORT"),
        ("http://me:secret@host", "wanted grpc://HOST:PORT"),
        ("http://host?a=1", "wanted grpc://HOST:PORT"),
        ("grpc://host/path", "got the path '/path', wanted none"),
        ("http://host:99999", "Port out of range"),
    ],
)
def test_wrong_urls(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Client(url)


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="certificate and key"):
        Tls(certificate="a.pem")
    with pytest.raises(ValueError, match="wanted grpcs:// or https://"):
        Client("http://host", tls=Tls())
    for scheme in ("grpcs", "https"):
        for kind in (Client, AsyncClient):
            with pytest.raises(ValueError, match=r"none\.pem: No such file"):
                kind(f"{scheme}://host", tls=Tls(root_certificates=tmp_path / "none.pem"))
    (tmp_path / "broken.pem").write_text("nothing")
    with pytest.raises(ValueError, match=r"broken\.pem: not what TLS can use"):
        Client("https://host", tls=Tls(tmp_path / "broken.pem"))
    with pytest.raises(ValueError, match="api_key: holds a character"):
        Client("http://host", api_key="a b")
    for wrong in ({"attempts": 0}, {"attempts": 101}, {"first_s": -1}, {"longest_s": 3601}, {"factor": 0.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RetryPolicy(**wrong)  # type: ignore[arg-type]
    assert RetryPolicy(attempts=100, longest_s=3600).longest_pause_s(99) == 3600


def test_a_key_comes_from_the_environment_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, " tt-secret\n")
    assert target_of("http://host").credentials == [("authorization", "Bearer tt-secret")]
    assert target_of("http://host", api_key="").credentials == []
    assert target_of("http://host", api_key="other").api_key == "other" and "secret" not in repr(
        target_of("http://host")
    )
    monkeypatch.setenv(KEY_VARIABLE, "tt secret")
    with pytest.raises(ValueError, match=f"{KEY_VARIABLE}: holds a character"):
        Client("http://host")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes its time for a look."""
    monkeypatch.setattr(tls_mistakes, "LONGEST_S", 60.0)
    monkeypatch.setattr(tls_mistakes, "_ALERT_S", 20.0)


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    named = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    _openssl("req", "-x509", *new, *named, "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem"))
    yield folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_tls_over_http(kind: type, certificates: Path, cells: ScriptedCells) -> None:
    """The server believes only clients that show a certificate."""
    cert, key = certificates / "cert.pem", certificates / "key.pem"
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(cert))
    context.load_cert_chain(cert, key)
    context.verify_mode = ssl.CERT_REQUIRED
    async with http_server(make_app(generation(cells), all_modes), context) as address:
        await _known_and_strangers(kind, f"https://{address}", cert, key)
        await _by_another_name(kind, f"https://{address}", cert, key)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_tls_over_grpc(
    kind: type, certificates: Path, cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = certificates / "cert.pem", certificates / "key.pem"
    pair = (key.read_bytes(), cert.read_bytes())
    credentials = grpc.ssl_server_credentials([pair], cert.read_bytes(), require_client_auth=True)
    made = grpc.aio.server

    def server(*arguments: Any, **options: Any) -> Any:
        ours: Any = made(*arguments, **options)
        ours.add_insecure_port = lambda at: ours.add_secure_port(at, credentials)
        return ours

    monkeypatch.setattr(grpc.aio, "server", server)
    async with grpc_server(generation(cells)) as (address, _):
        await _known_and_strangers(kind, f"grpcs://{address}", cert, key)
        await _by_another_name(kind, f"grpcs://{address}", cert, key)


async def _by_another_name(kind: type, url: str, cert: Path, key: Path) -> None:
    """The certificate is not the host's; the client is told whose it is, and has it as bytes."""
    named, unnamed = (Tls(cert.read_bytes(), cert, key, name) for name in ("127.0.0.1", None))
    asking = Asking(kind(url.replace("127.0.0.1", "localhost"), tls=named, retry=PROMPT_RETRIES))
    assert (await asking.complete("Hi")).text == TEXT
    await asking.close()
    wrong = kind(url.replace("127.0.0.1", "localhost"), tls=unnamed, retry=PROMPT_RETRIES)
    await _mistaken(
        wrong, r"localhost:\d+: got a certificate for 127.0.0.1, issued by 127.0.0.1, wanted one for localhost"
    )


async def _known_and_strangers(kind: type, url: str, cert: Path, key: Path) -> None:
    known = Asking(kind(url, tls=Tls(cert, cert, key), retry=PROMPT_RETRIES))
    assert (await known.complete("Hi")).text == TEXT
    await known.close()
    got = "got a certificate for 127.0.0.1, issued by 127.0.0.1"
    await _mistaken(
        kind(url, retry=PROMPT_RETRIES), f"{got}, wanted one that the system's roots vouch for: self.signed"
    )
    told = "wants a client certificate: got none, wanted one that the server believes"
    await _mistaken(kind(url, tls=Tls(cert), retry=PROMPT_RETRIES), told)
    plain = url.replace("s://", "://")
    await _mistaken(kind(plain, retry=PROMPT_RETRIES), f"speaks it: got {plain[:4]}://, wanted {plain[:4]}s://")


async def _mistaken(client: Client | AsyncClient, told: str) -> None:
    """Of a whole answer, of a stream, and where one asks whether it is ready: at once, and with what was got."""
    asking = Asking(client)
    for call in (asking.complete, asking.stream):
        with pytest.raises(TlsMistake, match=f"TLS: .*{told}") as caught:
            await call("Hi", timeout_s=100)  # type: ignore[operator]
        assert caught.value.attempts == 1 and not asking.pauses
        assert caught.value.code == "FAILED_PRECONDITION" and caught.value.request_id
    ready = await asking.of("ready", timeout_s=100)
    assert not ready.ready and ready.reason.startswith("TLS: ") and not await asking.is_alive()
    await asking.close()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("face", FACES)
async def test_a_service_that_does_not_speak_tls(
    kind: type, face: str, certificates: Path, cells: ScriptedCells
) -> None:
    async with serving(face, cells) as make:
        url = make(Client).target.url.replace("://", "s://")
        client = kind(url, tls=Tls(certificates / "cert.pem"), retry=PROMPT_RETRIES)
        await _mistaken(client, f"does not speak it: got {face}s://, wanted {face}://")


@pytest.mark.parametrize("scheme", ["grpc", "grpcs", "http", "https"])
def test_what_says_no_word_is_no_mistake(scheme: str) -> None:
    """It may be on its way down: what takes a connection and ends it, what takes it and is silent, and nobody."""
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        ending = threading.Thread(target=lambda: server.accept()[0].close())
        ending.start()
        assert mistake(target_at(scheme, server), 60.0) is None
        ending.join(60)
        assert mistake(target_at(scheme, silent), 0.05) is None
        nobody = target_at(scheme, silent)
    assert mistake(nobody, 60.0) is None


@pytest.mark.parametrize("scheme", ["grpcs", "https"])
def test_a_handshake_that_is_cut_stays_an_outage_and_says_so(scheme: str) -> None:
    """So it is asked again."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def cut() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(65536)  # the client's hello; what is unread would make the end a reset

        cutting = threading.Thread(target=cut)
        cutting.start()
        error = Unavailable("no connection", Details("UNAVAILABLE", request_id="r"))
        told = explained(target_at(scheme, server), error, 60.0)
        cutting.join(60)
    assert isinstance(told, Unavailable) and told.can_retry and told.request_id == "r"
    assert told.message == f"no connection; {tls_mistakes.CUT}"


def target_at(scheme: str, server: socket.socket) -> Target:
    return target_of(f"{scheme}://127.0.0.1:{server.getsockname()[1]}")


def test_what_the_service_said_itself_is_not_looked_into() -> None:
    target = target_of("grpcs://127.0.0.1:1")
    for details in (Details("UNAVAILABLE", status=503), Details("UNAVAILABLE", service_id="req-1")):
        error = Unavailable("gone", details)
        assert explained(target, error, None) is error


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_the_key_is_sent_and_a_missing_one_is_told(kind: type, cells: ScriptedCells) -> None:
    heads: list[dict[bytes, bytes]] = []
    app = make_app(generation(cells), all_modes)

    async def gate(scope: dict, receive: object, send: object) -> None:  # type: ignore[type-arg]
        heads.append(dict(scope["headers"]))
        if heads[-1].get(b"authorization") != b"Bearer tt-1":
            start = {"type": "http.response.start", "status": 401, "headers": [(b"x-should-retry", b"false")]}
            body = b'{"error":{"message":"no key","type":"authentication_error","param":null,"code":"invalid_api_key"}}'
            await send(start)  # type: ignore[operator]
            await send({"type": "http.response.body", "body": body})  # type: ignore[operator]
        else:
            await app(scope, receive, send)  # type: ignore[arg-type]

    async with http_server(gate) as address:
        for key in ("tt-1", ""):
            asking = Asking(kind(f"http://{address}", api_key=key, retry=PROMPT_RETRIES))
            if key:
                assert (await asking.complete("Hi")).text == TEXT
            else:
                with pytest.raises(Unauthenticated, match="no key") as caught:
                    await asking.complete("Hi")
                assert caught.value.attempts == 1 and b"authorization" not in heads[-1]
            await asking.close()


@pytest.mark.slow
def test_each_client_has_a_connection_of_its_own() -> None:
    """So several clients of one process come to several routers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        url = f"grpc://127.0.0.1:{server.getsockname()[1]}"
        with Client(url) as first, Client(url) as second:
            asking = [threading.Thread(target=client.is_alive) for client in (first, second)]
            for one in asking:
                one.start()
            accepted = [server.accept()[0] for _ in asking]
            assert len(accepted) == 2
            for one in asking:
                one.join(60)
            for peer in accepted:
                peer.close()
