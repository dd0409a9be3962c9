"""Options of Serve's HTTP proxies at their start, and a check that running proxies have the same."""

from typing import Any

from cluster.sections import IngressSection
from twotower.errors import ConfigError

_SETTINGS = {"port": "http_port", "ssl_certfile": "tls_cert_file", "ssl_keyfile": "tls_key_file"}
TLS = ("ssl_certfile", "ssl_keyfile")


def http_options(ingress: IngressSection) -> dict[str, Any]:
    """For `serve.start`, or `http_options` of a Serve YAML. A proxy reads the files when it
    starts; `cluster.faces.http.proxy_certificates` reads them again."""
    return {
        "host": ingress.host,
        "port": ingress.http_port,
        "ssl_keyfile": ingress.tls_key_file,
        "ssl_certfile": ingress.tls_cert_file,
    }


def check_same(running: Any, ingress: IngressSection, names: tuple[str, ...] = tuple(_SETTINGS)) -> None:
    """Raises ConfigError if Serve with these options listens elsewhere or with other certificates."""
    wanted = http_options(ingress)
    for name in names:
        there = getattr(running, name)
        if there != wanted[name]:
            raise ConfigError(
                f"ingress.{_SETTINGS[name]}: got {wanted[name]}, wanted {there}, which is http_options.{name} of the "
                "Serve that runs; it takes no other until it is started again"
            )
