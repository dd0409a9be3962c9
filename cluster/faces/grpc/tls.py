"""What the gRPC server shows in a handshake, and whom it lets in."""

import grpc

from cluster.certificates import Credentials
from cluster.rereading import Rereading


def server_credentials(certificates: Rereading[Credentials]) -> grpc.ServerCredentials:
    """Of each handshake by what the files say then; connections that stand go on. Whether clients have to show a
    certificate is settled now."""
    shown = certificates.now

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        if certificates.now is shown:
            return None
        shown = certificates.now
        return _configuration(shown)

    wants_client = shown.client_ca is not None
    # Its stub does not know that None says: as before.
    return grpc.dynamic_ssl_server_credentials(_configuration(shown), changed, wants_client)  # type: ignore[arg-type]


def _configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(credentials.key, credentials.chain)], credentials.client_ca)
