"""Certificates for tests, drawn once: a root, what it signed, and what is wrong in some way. Valid until 2099."""

import ipaddress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

NAME = "serving.example"
BEGAN, ENDS = datetime(2020, 1, 1, tzinfo=UTC), datetime(2099, 1, 1, tzinfo=UTC)
Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True)
class Pair:
    """A certificate with its key, in PEM."""

    certificate: x509.Certificate
    private: Key = field(repr=False)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key(self) -> bytes:
        return self.written(NoEncryption())

    def written(self, encryption: KeySerializationEncryption) -> bytes:
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)

    @property
    def encrypted_key(self) -> bytes:
        return self.written(BestAvailableEncryption(b"secret"))


def drawn(
    name: str,
    issuer: Pair | None = None,
    *,
    is_ca: bool = False,
    hosts: tuple[str, ...] = (NAME, "127.0.0.1"),
    began: datetime = BEGAN,
    ends: datetime = ENDS,
    key: Key | None = None,
) -> Pair:
    key = key or ec.generate_private_key(ec.SECP256R1())
    signing = key if issuer is None else issuer.private
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(began)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
        # Python 3.13 takes no certificate without them.
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
    )
    if is_ca:
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
    elif hosts:
        names = [
            x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host) for host in hosts
        ]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    algorithm = None if isinstance(signing, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return Pair(builder.sign(signing, algorithm), key)


@dataclass(frozen=True)
class Family:
    """`server` and `client` are signed by `middle`, which `root` has signed."""

    root: Pair
    middle: Pair
    server: Pair
    client: Pair

    @property
    def chain(self) -> bytes:
        return self.server.pem + self.middle.pem

    def files(self, directory: Path) -> dict[str, str]:
        """Of a service that wants to see clients' certificates, by setting."""
        contents = {
            "tls_cert_file": self.chain,
            "tls_key_file": self.server.key,
            "grpc_client_ca_file": self.root.pem,
        }
        for name, content in contents.items():
            (directory / name).write_bytes(content)
        return {name: str(directory / name) for name in contents}


@cache
def family(number: int = 0) -> Family:
    """The same each time; another for another number."""
    root = drawn(f"root {number}", is_ca=True)
    middle = drawn(f"middle {number}", root, is_ca=True)
    return Family(root, middle, drawn(f"server {number}", middle), drawn(f"client {number}", middle))
