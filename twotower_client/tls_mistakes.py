"""Finds out whether TLS is the reason why no connection is made: then a second attempt would fail too.

What a failed connection says differs by face and version. So a connection is opened to look, which asks for nothing.
"""

import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from twotower_client.errors import ServiceError, TlsMistake, Unavailable
from twotower_client.target import Target

LONGEST_S = 5.0  # for a look
CUT = "the TLS handshake was cut silently, by a service that shuts down or a gateway without a service behind it"
_ALERT_S = 0.5  # a server that wants a certificate says so once it has read that there is none
_WRONG_NAME = (62, 64)  # OpenSSL's numbers: no such host, no such address


class _Cut(Exception):
    """The handshake ended without a reason. This looks like an outage, not like a mistake."""


def explained(target: Target, error: ServiceError, within_s: float | None) -> ServiceError:
    """A TlsMistake if TLS caused the error, else the error. If the handshake was cut, the error's message says so.
    Takes `within_s` seconds at most.
    """
    nobody_answered = isinstance(error, Unavailable) and error.status is None and not error.service_id
    if not nobody_answered or target.use_proxies:
        return error
    try:
        message = _seen(target, LONGEST_S if within_s is None else min(LONGEST_S, within_s))
    except _Cut:
        return Unavailable(f"{error.message}; {CUT}", error.details)
    if message is None:
        return error
    return TlsMistake(message, replace(error.details, code="FAILED_PRECONDITION"))


def mistake(target: Target, within_s: float) -> str | None:
    """What was got and wanted; None if TLS is not the cause, for example if nobody listens."""
    try:
        return _seen(target, within_s)
    except _Cut:
        return None


def _seen(target: Target, within_s: float) -> str | None:
    """Raises _Cut."""
    look = _Look(target, time.monotonic() + within_s)
    try:
        return look.secured() if target.secure else look.plain()
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class _Look:
    target: Target
    ends_at: float

    def plain(self) -> str | None:
        """For a client that does not speak TLS: whether the server does."""
        try:
            self._shaken(_unverifying(), lambda _: None)
        except ssl.SSLError as error:
            if not _is_alert(error):
                return None
        scheme = self.target.scheme
        return f"TLS: {self.target.address} speaks it: got {scheme}://, wanted {scheme}s://"

    def secured(self) -> str | None:
        context = self._context(self.target.tls.context())
        try:
            told = self._shaken(context, self._after_handshake)
            # Once more: who is on its way down shakes hands no second time.
            return None if told is None else self._shaken(context, self._after_handshake)
        except ssl.SSLCertVerificationError as error:
            return self._not_believed(error)
        except ssl.SSLError as error:
            return self._refused(error)

    def _after_handshake(self, secured: ssl.SSLSocket) -> str | None:
        """Whether the server accepts our certificate. It may say so only after the handshake: by an alert or, as gRPC's
        and asyncio's servers do, by ending the connection. A server that accepts it sends something, or waits for a
        request.
        """
        secured.settimeout(min(_ALERT_S, self._left_s))
        try:
            if secured.recv(1):
                return None
        except TimeoutError:
            return None
        except ssl.SSLError as error:
            return self._refused(error)
        except ConnectionError:
            pass
        return self._wants_certificate("it ended the connection after the handshake")

    def _refused(self, error: ssl.SSLError) -> str | None:
        scheme, address = self.target.scheme, self.target.address
        if isinstance(error, ssl.SSLEOFError):
            raise _Cut from None
        if not _is_alert(error):
            return f"TLS: {address} does not speak it: got {scheme}://, wanted {scheme.removesuffix('s')}://"
        return self._wants_certificate(_words(error))

    def _wants_certificate(self, seen: str) -> str:
        own = self.target.tls.certificate
        wanted = "wanted one that the server believes, as Tls(certificate=..., key=...)"
        got = f"got {'none' if own is None else own}"
        return f"TLS: {self.target.address} wants a client certificate: {got}, {wanted} ({seen})"

    def _not_believed(self, error: ssl.SSLCertVerificationError) -> str:
        address, tls = self.target.address, self.target.tls
        got = f"got a certificate {self._described()}"
        if error.verify_code in _WRONG_NAME:
            return f"TLS: {address}: {got}, wanted one for {self._name}; Tls(server_name=...) names another"
        roots = "bytes" if isinstance(tls.root_certificates, bytes) else tls.root_certificates
        by = "the system's roots vouch" if roots is None else f"root_certificates ({roots}) vouch"
        return f"TLS: {address}: {got}, wanted one that {by} for: {error.verify_message}"

    def _described(self) -> str:
        """The server's certificate in words. It can be read only if it is trusted, so it is used as its own root."""
        try:
            shown = self._shaken(self._context(_unverifying()), lambda secured: secured.getpeercert(binary_form=True))
            context = self._context(ssl.create_default_context(cadata=ssl.DER_cert_to_PEM_cert(shown or b"")))
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            context.check_hostname = False
            certificate: Any = self._shaken(context, lambda secured: secured.getpeercert())
        except (OSError, ValueError):
            return "that cannot be read"
        names = ", ".join(name for _, name in certificate.get("subjectAltName", ())) or "no name"
        issuer = ", ".join(value for part in certificate.get("issuer", ()) for _, value in part)
        return f"for {names}, issued by {issuer or 'nobody'}"

    def _context(self, context: ssl.SSLContext) -> ssl.SSLContext:
        """gRPC's servers end a connection that has not offered HTTP/2."""
        context.set_alpn_protocols(["h2"] if self.target.over_grpc else ["http/1.1"])
        return context

    def _shaken(self, context: ssl.SSLContext, look: Callable[[ssl.SSLSocket], Any]) -> Any:
        host, _, port = self.target.address.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), self._left_s) as plain:
            plain.settimeout(self._left_s)
            with context.wrap_socket(plain, server_hostname=self._name) as secured:
                return look(secured)

    @property
    def _name(self) -> str:
        return self.target.tls.server_name or self.target.address.rpartition(":")[0].strip("[]")

    @property
    def _left_s(self) -> float:
        left = self.ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _unverifying() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _is_alert(error: ssl.SSLError) -> bool:
    """Whether the other side, which speaks TLS, has refused ours."""
    return "ALERT" in (error.reason or "")


def _words(error: ssl.SSLError) -> str:
    return (error.reason or "").lower().replace("_", " ")
