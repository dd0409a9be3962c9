"""Where a service is, and how to reach it: its URL, TLS, key. Opens no connection."""

import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

KEY_VARIABLE = "TWOTOWER_API_KEY"
_PORTS = {"grpc": 50051, "grpcs": 443, "http": 80, "https": 443}
_WANTED = "grpc://HOST:PORT, grpcs://, http:// or https://"


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM. `root_certificates`: the trusted certificates instead of the system's, as a file or its bytes.
    `certificate` and `key`: the client's own, if the server requires one. `server_name`: the name in the server's
    certificate, if it differs from the URL's.
    """

    root_certificates: str | Path | bytes | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key: got one of them, wanted both or none")

    def context(self) -> ssl.SSLContext:
        """The ssl context for HTTP. Raises ValueError with the file's name."""
        self.read()
        try:
            roots = _content(self.root_certificates)
            context = ssl.create_default_context(cadata=None if roots is None else roots.decode())
            # As with gRPC, a trusted certificate need not be a root.
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, _path(self.key))
        except (ssl.SSLError, UnicodeDecodeError) as error:
            files = (self.root_certificates, self.certificate, self.key)
            named = ", ".join("bytes" if isinstance(file, bytes) else str(file) for file in files if file)
            raise ValueError(f"{named}: not what TLS can use: {error}") from None
        return context

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Root certificates, key and certificate, in gRPC's order. Raises ValueError with the file's name."""
        return _content(self.root_certificates), _content(self.key), _content(self.certificate)


@dataclass(frozen=True, slots=True)
class Target:
    """One face of a service. `use_proxies`: whether to use the environment's proxies."""

    scheme: str
    address: str  # HOST:PORT, an IPv6 host in brackets
    path: str = ""
    tls: Tls = field(default_factory=Tls)
    api_key: str = field(default="", repr=False)
    use_proxies: bool = False

    @property
    def over_grpc(self) -> bool:
        return self.scheme.startswith("grpc")

    @property
    def secure(self) -> bool:
        return self.scheme in ("grpcs", "https")

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}{self.path}"

    @property
    def credentials(self) -> list[tuple[str, str]]:
        """The key as headers or metadata."""
        return [("authorization", f"Bearer {self.api_key}")] if self.api_key else []


def target_of(url: str, api_key: str | None = None, tls: Tls | None = None, use_proxies: bool = False) -> Target:
    """The target of a URL. Without `api_key` the key is the environment's TWOTOWER_API_KEY. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError(f"url: got {url!r}, wanted {_WANTED}")
    path = parts.path.rstrip("/")
    if path and parts.scheme.startswith("grpc"):
        raise ValueError(f"url: got the path {path!r}, wanted none over gRPC")
    try:
        port = parts.port or _PORTS[parts.scheme]
    except ValueError as error:
        raise ValueError(f"url: got {url!r}: {error}") from None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    target = Target(parts.scheme, f"{host}:{port}", path, tls or Tls(), _key(api_key), use_proxies)
    if tls is not None and not target.secure:
        raise ValueError(f"tls: got some with {parts.scheme}://, wanted grpcs:// or https://")
    return target


def _key(given: str | None) -> str:
    name, key = ("api_key", given) if given is not None else (KEY_VARIABLE, os.environ.get(KEY_VARIABLE, ""))
    key = key.strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(f"{name}: holds a character that no key has")
    return key


def _path(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _content(path: str | Path | bytes | None) -> bytes | None:
    if path is None or isinstance(path, bytes):
        return path
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
