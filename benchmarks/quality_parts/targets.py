"""What answers: a pair in this process, or a service over gRPC or HTTP, each as a `Path` of the reference benchmark."""

import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path as Directory
from urllib.parse import urlsplit

import httpx
import torch

from benchmarks.reference.paths import TIMEOUT_S, PairPath, Path, Piece, Running, ServedPath
from cluster.cli.asking import model_info
from twotower.core import Mode, Request
from twotower.engine.in_process import open_pair
from twotower.engine.settings import EngineSettings
from twotower.errors import ConfigError, Unavailable

_SETTINGS = EngineSettings(max_sequences=16, max_sequence_length=512, max_queued_requests=256)


def target_of(text: str, checkpoint: Directory) -> Path:
    """`local`, `grpc://HOST:PORT` or `http://HOST:PORT`. Raises ConfigError."""
    if text == "local":
        return LocalPath(checkpoint)
    parts = urlsplit(text)
    if parts.scheme in ("grpc", "http") and parts.netloc and parts.path in ("", "/"):
        return ServedPath(parts.netloc) if parts.scheme == "grpc" else HttpPath(parts.netloc)
    raise ConfigError(f"--target: got {text!r}, wanted local, grpc://HOST:PORT or http://HOST:PORT")


def served_fingerprint(target: str) -> str | None:
    """The checkpoint that a service says it serves; None for `local`. Raises Unavailable or Refused."""
    parts = urlsplit(target)
    if parts.scheme == "grpc":
        return model_info(parts.netloc).checkpoint_fingerprint
    if parts.scheme == "http":
        answer = httpx.get(f"{target.rstrip('/')}/v1/models", timeout=10, trust_env=False)
        return str(answer.raise_for_status().json()["data"][0].get("checkpoint_fingerprint"))
    return None


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


class HttpPath:
    """`POST /v1/completions` with events, of a service that is already up."""

    name = "http"

    def __init__(self, address: str) -> None:
        self._address = address

    def open(self) -> AbstractAsyncContextManager[Running]:
        return _http(self._address)


@asynccontextmanager
async def _http(address: str) -> AsyncIterator[Running]:
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(
        base_url=f"http://{address}", timeout=TIMEOUT_S, limits=limits, trust_env=False
    ) as client:
        yield _HttpClient(client)


class _HttpClient:
    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def generate(self, request: Request) -> AsyncIterator[Piece]:
        async with self._client.stream("POST", "/v1/completions", json=_body(request)) as response:
            if response.status_code != 200:
                said = (await response.aread()).decode(errors="replace")
                raise Unavailable(f"request {request.id}: HTTP {response.status_code}: {said[:300]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise Unavailable(f"request {request.id}: {event['error']['message']}")
                for choice in event["choices"]:
                    yield Piece(tuple(choice["token_ids"]), 0)
                if "usage" in event:  # HTTP tells the costs of the whole answer, not of each block
                    yield Piece((), event["usage"]["num_steps"], event["usage"]["num_blocks"])


def _body(request: Request) -> dict[str, object]:
    params = request.params
    diffusion: dict[str, object] = {"mode": str(params.mode)}
    if params.mode is Mode.DIFFUSION:
        diffusion |= {
            "block_size": params.block_size,
            "steps_per_block": params.steps_per_block,
            "confidence_threshold": params.confidence_threshold,
        }
    return {
        "prompt": list(request.prompt_token_ids),
        "request_id": request.id,
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "seed": params.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        "diffusion": diffusion,
    }
