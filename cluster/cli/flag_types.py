"""Values of flags that are not parameters: errors are argparse's own, one line with the flag's name."""

import re
from argparse import ArgumentTypeError

_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):([0-9]{1,5})")
_LONGEST_TIMEOUT_S = 1_000_000  # gRPC takes a much longer time for none


def seconds(text: str) -> float:
    """A time to wait: above zero."""
    try:
        value = float(text.replace("_", "?"))
    except ValueError:
        value = -1.0
    if not 0 < value <= _LONGEST_TIMEOUT_S:
        raise ArgumentTypeError(f"got {text!r}, wanted seconds, above 0 and at most {_LONGEST_TIMEOUT_S}")
    return value


def port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and 0 < int(text) < 2**16):
        raise ArgumentTypeError(f"got {text!r}, wanted a port from 1 to 65535")
    return int(text)


def host_and_port(text: str) -> str:
    """An address as gRPC takes it, unchanged."""
    found = _HOST_AND_PORT.fullmatch(text)
    if found is None:
        raise ArgumentTypeError(f"got {text!r}, wanted HOST:PORT, such as 127.0.0.1:50051 or [::1]:50051")
    port(found[2])
    return text
