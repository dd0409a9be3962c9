"""A frame: a length, then so many bytes. The codec handles their content."""

import struct
from collections.abc import Iterator

_LENGTH = struct.Struct("!I")
MOST_BYTES = 64 << 20


def framed(body: bytes) -> bytes:
    """One frame. Raises ValueError for more than 64 MiB."""
    if len(body) > MOST_BYTES:
        raise ValueError(f"got a frame of {len(body)} bytes, wanted at most {MOST_BYTES}")
    return _LENGTH.pack(len(body)) + body


class Splitter:
    """Splits a stream of bytes into frames. `most_bytes`: the maximum size of the next one."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self._received = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies of all frames that are complete by now. Raises ConnectionError for bytes that are no frame."""
        self._received += data
        start = 0
        try:
            while len(self._received) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._received, start)
                if length > self.most_bytes:
                    raise ConnectionError(f"got a frame of {length} bytes, wanted at most {self.most_bytes}")
                end = start + _LENGTH.size + length
                if len(self._received) < end:
                    return
                body = bytes(self._received[start + _LENGTH.size : end])
                start = end
                yield body
        finally:
            del self._received[:start]
