"""A file that is there as a whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from twotower.errors import InvalidRequest


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Write beside `path`, and put the file in its place at the end; after an error nothing is left, old content stays.

    Raises InvalidRequest where nothing can be written there, at once.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise InvalidRequest.of("--output", f"{path}: not a regular file")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        file = part.open("w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise InvalidRequest.of("--output", f"{path}: {error.strerror or error}") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
