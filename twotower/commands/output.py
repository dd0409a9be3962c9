"""A file that is written completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from twotower.errors import InvalidRequest


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Write to a file beside `path`, and rename it to `path` at the end. After an error the old content stays and
    nothing else is left.

    Raises InvalidRequest at once if `path` cannot be written.
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
