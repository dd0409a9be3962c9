"""Server-sent events from the bytes of a stream. Knows nothing of what they tell."""


class EventReader:
    """Server-sent events from bytes as they come. Lines end with a newline alone, as ours do: a text may hold every
    other sign that ends a line somewhere."""

    LARGEST = 64 * 2**20

    def __init__(self) -> None:
        self._rest = b""
        self._name, self._data = "", list[bytes]()

    def push(self, data: bytes) -> list[tuple[str, bytes]]:
        """(name, data) of each event that is complete now. Raises ValueError for one that is too long."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > self.LARGEST:
            raise ValueError(f"an event of more than {self.LARGEST} bytes")
        return [event for line in lines if (event := self._line(line.rstrip(b"\r"))) is not None]

    def _line(self, line: bytes) -> tuple[str, bytes] | None:
        if not line:
            event = (self._name, b"\n".join(self._data)) if self._data else None
            self._name, self._data = "", []
            return event
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
        elif field == b"event":
            self._name = value.strip().decode()
        return None
