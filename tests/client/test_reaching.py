"""Where a service is and how it is reached: URLs, keys, TLS."""

import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.faces.http.service import make_app
from tests.client.conftest import PROMPT_RETRIES, Asking, http_server
from tests.cluster.fakes import ScriptedCells, all_modes, generation, grpc_server
from tests.cluster.test_http import TEXT
from twotower_client import AsyncClient, Client, RetryPolicy, Tls, Unauthenticated, Unavailable
from twotower_client.target import KEY_VARIABLE, target_of


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
    asking = Asking(kind(url.replace("127.0.0.1", "localhost"), tls=unnamed, retry=RetryPolicy(attempts=1)))
    with pytest.raises(Unavailable):
        await asking.complete("Hi", timeout_s=20)
    await asking.close()


async def _known_and_strangers(kind: type, url: str, cert: Path, key: Path) -> None:
    known = Asking(kind(url, tls=Tls(cert, cert, key), retry=PROMPT_RETRIES))
    assert (await known.complete("Hi")).text == TEXT
    await known.close()
    for tls in (Tls(), Tls(cert)):
        stranger = Asking(kind(url, tls=tls, retry=RetryPolicy(attempts=1)))
        with pytest.raises(Unavailable):
            await stranger.complete("Hi", timeout_s=20)
        await stranger.close()


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
