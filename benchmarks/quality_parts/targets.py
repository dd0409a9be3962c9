"""What answers: a pair in this process, or a service over gRPC or HTTP, each as a `Path` of the reference benchmark."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path as Directory
from urllib.parse import urlsplit

import torch

from benchmarks.reference.paths import PairPath, Path, Running, ServedPath
from twotower.engine.in_process import open_pair
from twotower.engine.settings import EngineSettings
from twotower.errors import ConfigError
from twotower_client import Client, RetryPolicy

_SETTINGS = EngineSettings(max_sequences=16, max_sequence_length=512, max_queued_requests=256)


def target_of(text: str, checkpoint: Directory) -> Path:
    """`local`, `grpc://HOST:PORT` or `http://HOST:PORT`. Raises ConfigError."""
    if text == "local":
        return LocalPath(checkpoint)
    parts = urlsplit(text)
    if parts.scheme in ("grpc", "http") and parts.netloc and parts.path in ("", "/"):
        return ServedPath(parts.netloc, parts.scheme)
    raise ConfigError(f"--target: got {text!r}, wanted local, grpc://HOST:PORT or http://HOST:PORT")


def served_fingerprint(target: str) -> str | None:
    """The checkpoint that a service says it serves; None for `local`. Raises ServiceError."""
    if urlsplit(target).scheme not in ("grpc", "http"):
        return None
    with Client(target, retry=RetryPolicy(attempts=1)) as client:
        return client.model(timeout_s=10).checkpoint_fingerprint


def runs_here(target: str) -> bool:
    """Whether passes timed in this process say anything about the target: a CPU, and this machine's."""
    host = urlsplit(target).hostname
    return not torch.cuda.is_available() and (host is None or host == "localhost" or host.startswith("127."))


class LocalPath:
    """`twotower.engine.in_process` on a checkpoint; the pair is made when the path is opened."""

    name = "local"

    def __init__(self, checkpoint: Directory) -> None:
        self._checkpoint = checkpoint

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Running]:
        async with open_pair(self._checkpoint, _SETTINGS, device="auto") as pair:
            yield PairPath(pair)
