"""The files of TLS: read, and checked before use. Knows nothing of the faces.

`cryptography` is imported when a file is read, so a service without TLS does not import it.
"""

import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.rereading import Rereading
from cluster.sections import IngressSection
from twotower.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_MOST_BYTES = 2**20
_LEAST_RSA_BITS = 2048
_CURVES = ("secp256r1", "secp384r1")  # gRPC accepts no other in a handshake


@dataclass(frozen=True, slots=True)
class Files:
    """The files by setting. `client_ca` None: clients show no certificate."""

    certificate: Path
    key: Path
    client_ca: Path | None

    @classmethod
    def of(cls, ingress: IngressSection) -> "Files | None":
        """None: the faces do not speak TLS."""
        if ingress.tls_cert_file is None or ingress.tls_key_file is None:
            return None
        client_ca = ingress.grpc_client_ca_file
        return cls(Path(ingress.tls_cert_file), Path(ingress.tls_key_file), Path(client_ca) if client_ca else None)

    @property
    def all(self) -> list[Path]:
        return [self.certificate, self.key, *([self.client_ca] if self.client_ca else [])]


@dataclass(frozen=True, slots=True)
class Credentials:
    """In PEM, and checked. `until`: when the first of the chain ends."""

    chain: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None
    until: datetime


class _Wrong(Exception):
    """What is wrong with a file."""


def rereading(files: Files) -> Rereading[Credentials]:
    """Raises ConfigError."""
    return Rereading("certificates", files.all, lambda: read(files))


def contexts(files: Files) -> Rereading[ssl.SSLContext]:
    """What a server shows in a handshake, by Python's own TLS. Raises ConfigError."""
    return Rereading("certificates of HTTP", files.all, lambda: _context(files))


def _context(files: Files) -> ssl.SSLContext:
    """Reads the files twice. Where they change in between, the first look after it reads them again."""
    read(files)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.certificate, files.key)
    except OSError as error:
        raise ConfigError(f"ingress.tls_cert_file: {files.certificate}: {error.strerror or error}") from None
    return context


def read(files: Files, now: datetime | None = None) -> Credentials:
    """Raises ConfigError for a file that cannot be read, or that no client would accept."""
    now = now or datetime.now(UTC)
    with _of("tls_cert_file", files.certificate):
        chain_pem = _content(files.certificate)
        chain = _certificates(chain_pem)
    with _of("tls_key_file", files.key):
        key_pem = _content(files.key)
        _check_key(key_pem, chain, files.certificate)
    with _of("tls_cert_file", files.certificate):
        _check_order(chain)
        _check_dates(chain, now)
        names_of(chain[0])
    ca_pem = None
    if files.client_ca is not None:
        with _of("grpc_client_ca_file", files.client_ca):
            ca_pem = _content(files.client_ca)
            _check_authorities(_certificates(ca_pem), now)
    return Credentials(chain_pem, key_pem, ca_pem, min(each.not_valid_after_utc for each in chain))


def end_of(der: bytes) -> datetime:
    """Of one certificate, as a handshake tells it."""
    from cryptography.x509 import load_der_x509_certificate

    return load_der_x509_certificate(der).not_valid_after_utc


def leaf(path: Path) -> tuple[bytes, str]:
    """The first certificate of a file, in PEM, and a host that it is for. Raises ConfigError."""
    from cryptography.hazmat.primitives.serialization import Encoding

    with _of("tls_cert_file", path):
        first = _certificates(_content(path))[0]
        return first.public_bytes(Encoding.PEM), names_of(first)[0].replace("*.", "any.", 1)


def names_of(certificate: "Certificate") -> list[str]:
    """The names and addresses in a certificate, at least one."""
    from cryptography.x509 import (
        DNSName,
        DuplicateExtension,
        ExtensionNotFound,
        IPAddress,
        SubjectAlternativeName,
        UnsupportedGeneralNameType,
    )

    try:
        told = certificate.extensions.get_extension_for_class(SubjectAlternativeName).value
    except ExtensionNotFound:
        told = SubjectAlternativeName([])
    except (ValueError, DuplicateExtension, UnsupportedGeneralNameType) as error:
        raise _Wrong(f"{_shown(certificate)} has extensions that cannot be read: {error}") from None
    names = [*told.get_values_for_type(DNSName), *map(str, told.get_values_for_type(IPAddress))]
    if not names:
        raise _Wrong(f"{_shown(certificate)} names no host; wanted a subjectAltName, by which clients know the service")
    return names


@contextmanager
def _of(setting: str, path: Path) -> Iterator[None]:
    """Turns an error into a ConfigError that names setting and file and repeats nothing of a key."""
    try:
        yield
    except _Wrong as error:
        raise ConfigError(f"ingress.{setting}: {path}: {error}") from None


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise _Wrong(f"cannot be read: {error.strerror}") from None
    if len(content) > _MOST_BYTES:
        raise _Wrong(f"got more than {_MOST_BYTES} bytes")
    return content


def _certificates(pem: bytes) -> "list[Certificate]":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.x509 import load_pem_x509_certificates

    try:
        certificates = load_pem_x509_certificates(pem)
        for each in certificates:
            each.public_key()
        return certificates
    except (ValueError, UnsupportedAlgorithm):
        raise _Wrong("holds no certificate in PEM, or one that is damaged") from None


def _check_key(pem: bytes, chain: "Sequence[Certificate]", file: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(pem, None)
    except TypeError:
        raise _Wrong("is encrypted; wanted a key without a password") from None
    except (ValueError, UnsupportedAlgorithm):
        raise _Wrong("holds no private key in PEM, or one that is damaged") from None
    match key:
        case RSAPrivateKey() if key.key_size >= _LEAST_RSA_BITS:
            pass
        case EllipticCurvePrivateKey() if key.curve.name in _CURVES:
            pass
        case _:
            raise _Wrong(f"wanted RSA of at least {_LEAST_RSA_BITS} bits, or ECDSA on P-256 or P-384")
    owned = [number for number, each in enumerate(chain, 1) if each.public_key() == key.public_key()]
    if not owned:
        raise _Wrong(f"does not belong to the certificate of {file}")
    if owned[0] != 1:
        raise _Wrong(f"belongs to certificate {owned[0]} of {file}; wanted the service's own certificate first there")


def _check_order(chain: "Sequence[Certificate]") -> None:
    from cryptography.exceptions import InvalidSignature

    for number, (lower, upper) in enumerate(pairwise(chain), 1):
        try:
            lower.verify_directly_issued_by(upper)
        except (ValueError, TypeError, InvalidSignature):
            raise _Wrong(
                f"certificate {number}, {_shown(lower)}, is not signed by the next one, {_shown(upper)}; wanted the "
                "service's own certificate, then that of its issuer, and so on"
            ) from None


def _check_dates(chain: "Sequence[Certificate]", now: datetime) -> None:
    for each in chain:
        if now > each.not_valid_after_utc:
            raise _Wrong(
                f"{_shown(each)} has expired: it was valid until {each.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            )
        if now < each.not_valid_before_utc:
            raise _Wrong(f"{_shown(each)} is not valid before {each.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")


def _check_authorities(authorities: "Sequence[Certificate]", now: datetime) -> None:
    """Many bundles contain expired roots."""
    if not any(each.not_valid_before_utc <= now <= each.not_valid_after_utc for each in authorities):
        raise _Wrong(f"none of its {len(authorities)} certificates is valid today")


def _shown(certificate: "Certificate") -> str:
    return certificate.subject.rfc4514_string()[:100] or "one without a subject"
