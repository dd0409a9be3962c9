"""Certificate files: what is wrong with them is said before anything starts."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from cluster import certificates
from cluster.certificates import Files
from cluster.config import ServiceConfig
from cluster.ops import deployment
from tests.certificates import ENDS, NAME, drawn, family
from twotower.errors import ConfigError

SOME, OTHER = family(), family(1)
PAST = datetime(2021, 1, 1, tzinfo=UTC)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    by_setting = SOME.files(tmp_path)
    found = Files.of(ServiceConfig.parse({"ingress": by_setting}).ingress)
    assert found is not None
    return found


def test_what_is_right_is_read_as_it_is(files: Files) -> None:
    told = certificates.read(files)
    assert (told.chain, told.key, told.client_ca, told.until) == (SOME.chain, SOME.server.key, SOME.root.pem, ENDS)
    assert "PRIVATE" not in repr(told)
    files.certificate.write_bytes(SOME.chain + SOME.root.pem)
    assert certificates.read(files).chain.endswith(SOME.root.pem), "the root may be there too"
    alone = drawn("alone")
    files.certificate.write_bytes(alone.pem)
    files.key.write_bytes(alone.key)
    assert certificates.read(files).chain == alone.pem
    assert certificates.leaf(files.certificate) == (alone.pem, NAME)


CERT, KEY, CA = "tls_cert_file", "tls_key_file", "grpc_client_ca_file"
WRONG: list[tuple[str, Callable[[], dict[str, bytes]], str]] = [
    (CERT, lambda: {CERT: b""}, "holds no certificate in PEM"),
    (CERT, lambda: {CERT: SOME.server.key}, "holds no certificate in PEM"),
    (CERT, lambda: {CERT: SOME.server.pem[:300] + SOME.server.pem[310:]}, "or one that is damaged"),
    (CERT, lambda: {CERT: bytes(2**20 + 1)}, "got more than 1048576 bytes"),
    (KEY, lambda: {KEY: b"no key"}, "holds no private key in PEM"),
    (KEY, lambda: {KEY: SOME.server.pem}, "holds no private key in PEM"),
    (KEY, lambda: {KEY: SOME.server.encrypted_key}, "is encrypted; wanted a key without a password"),
    (KEY, lambda: {KEY: OTHER.server.key}, r"does not belong to the certificate of .*tls_cert_file$"),
    (KEY, lambda: {CERT: SOME.middle.pem + SOME.server.pem}, "belongs to certificate 2 of .*wanted the service's own"),
    (CERT, lambda: {CERT: SOME.server.pem + SOME.root.pem}, "certificate 1, CN=server 0, is not signed by .*CN=root 0"),
    (
        CERT,
        lambda: {CERT: SOME.server.pem + SOME.root.pem + SOME.middle.pem},
        "certificate 1, CN=server 0, is not signed by the next one, CN=root 0",
    ),
    (CERT, lambda: {CERT: SOME.server.pem + OTHER.middle.pem}, "is not signed by the next one, CN=middle 1"),
    (CA, lambda: {CA: b"-----BEGIN CERTIFICATE-----\n"}, "holds no certificate in PEM"),
    (CA, lambda: {CA: drawn("old root", is_ca=True, ends=PAST).pem}, "none of its 1 certificates is valid today"),
]


@pytest.mark.parametrize(("setting", "contents", "words"), WRONG)
def test_what_is_wrong_is_said(
    setting: str, contents: Callable[[], dict[str, bytes]], words: str, files: Files, tmp_path: Path
) -> None:
    for name, content in contents().items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        certificates.read(files)
    assert str(caught.value).startswith(f"ingress.{setting}: {tmp_path / setting}: ")


@pytest.mark.parametrize(
    ("key", "is_taken"),
    [
        (ec.generate_private_key(ec.SECP384R1()), True),
        (ec.generate_private_key(ec.SECP521R1()), False),
        (ed25519.Ed25519PrivateKey.generate(), False),
    ],
)
def test_kinds_of_keys(key: ec.EllipticCurvePrivateKey, is_taken: bool, files: Files) -> None:
    """gRPC would refuse every handshake with another."""
    pair = drawn("server", key=key)
    files.certificate.write_bytes(pair.pem)
    files.key.write_bytes(pair.key)
    if is_taken:
        assert certificates.read(files).key == pair.key
        return
    with pytest.raises(ConfigError, match="wanted RSA of at least 2048 bits, or ECDSA on P-256 or P-384"):
        certificates.read(files)


def test_a_short_rsa_key(files: Files) -> None:
    pair = drawn("server", key=rsa.generate_private_key(65537, 1024))  # type: ignore[arg-type]
    files.certificate.write_bytes(pair.pem)
    files.key.write_bytes(pair.key)
    with pytest.raises(ConfigError, match="wanted RSA of at least 2048 bits"):
        certificates.read(files)


def test_dates_and_names(files: Files) -> None:
    for pair, words in (
        (drawn("old", ends=PAST), r"CN=old has expired: it was valid until 2021-01-01 00:00 UTC"),
        (drawn("new", began=datetime(2098, 1, 1, tzinfo=UTC)), "CN=new is not valid before 2098-01-01"),
        (drawn("nameless", hosts=()), "CN=nameless names no host; wanted a subjectAltName"),
    ):
        files.certificate.write_bytes(pair.pem)
        files.key.write_bytes(pair.key)
        with pytest.raises(ConfigError, match=words):
            certificates.read(files)
    old = drawn("middle 0", SOME.root, is_ca=True, ends=PAST, key=SOME.middle.private)
    files.certificate.write_bytes(SOME.server.pem + old.pem)
    files.key.write_bytes(SOME.server.key)
    with pytest.raises(ConfigError, match="CN=middle 0 has expired"):
        certificates.read(files)


def test_a_bundle_of_authorities_may_hold_old_ones(files: Files) -> None:
    assert files.client_ca is not None
    files.client_ca.write_bytes(drawn("old root", is_ca=True, ends=PAST).pem + SOME.root.pem)
    assert certificates.read(files).client_ca is not None


def test_files_that_are_not_there(files: Files) -> None:
    files.key.unlink()
    with pytest.raises(ConfigError, match=r"tls_key_file: .* cannot be read: No such file"):
        certificates.read(files)
    files.certificate.unlink()
    files.certificate.mkdir()
    with pytest.raises(ConfigError, match=r"tls_cert_file: .* cannot be read: Is a directory"):
        certificates.read(files)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({CERT: "/a"}, "tls_key_file: got none"),
        ({KEY: "/a"}, "tls_cert_file: got none"),
        ({CA: "/a"}, "tls_cert_file: got none"),
        ({CERT: "a", KEY: "/b"}, "tls_cert_file: got 'a', wanted an absolute path"),
        ({CERT: "/a", KEY: "/b", CA: "c"}, "grpc_client_ca_file: got 'c', wanted an absolute path"),
    ],
)
def test_settings_that_are_not_whole(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=f"ingress.{words}"):
        ServiceConfig.parse({"ingress": settings})


def test_up_looks_at_the_files_before_anything_starts(tmp_path: Path) -> None:
    settings = SOME.files(tmp_path)
    deployment.check(ServiceConfig.parse({"ingress": settings}))
    (tmp_path / KEY).write_bytes(OTHER.server.key)
    with pytest.raises(ConfigError, match=r"tls_key_file: .* does not belong"):
        deployment.check(ServiceConfig.parse({"ingress": settings}))
