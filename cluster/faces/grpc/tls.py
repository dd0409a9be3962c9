"""The gRPC server's certificates in handshakes, and its check of clients' certificates."""

import grpc

from cluster.certificates import Credentials
from cluster.rereading import Rereading


def server_credentials(certificates: Rereading[Credentials]) -> grpc.ServerCredentials:
    """Each handshake uses the files' present content; existing connections continue. Whether clients must show a
    certificate is decided now.
    """
    shown = certificates.now

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        if certificates.now is shown:
            return None
        shown = certificates.now
        return _configuration(shown)

    wants_client = shown.client_ca is not None
    # Its stub does not know that None means: unchanged.
    return grpc.dynamic_ssl_server_credentials(_configuration(shown), changed, wants_client)  # type: ignore[arg-type]


def _configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(credentials.key, credentials.chain)], credentials.client_ca)
