"""A self-signed certificate for 127.0.0.1, by the openssl program."""

import subprocess
from pathlib import Path

from benchmarks.transport_parts.seam import Secrets


def self_signed(folder: Path) -> Secrets:
    secrets = Secrets(folder / "certificate.pem", folder / "key.pem")
    arguments = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1".split()
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(secrets.key), "-out", str(secrets.certificate)]
    subprocess.run(["openssl", *arguments, *files], check=True, capture_output=True)
    return secrets
