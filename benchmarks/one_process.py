"""The HTTP face and a router's code over a pair of the demo's towers, in one process without Ray. A client can be tried
on it where Ray has no room. `python -m benchmarks.one_process [PORT]`. It lacks cells that come and go, Serve's proxy,
and gRPC.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Set

import torch
import uvicorn

from cluster.config import ServiceConfig
from cluster.faces.http.service import make_app
from cluster.runs.generation import Generation
from cluster.runs.served_model import ServedModel, load_served_model
from cluster.served_paths import checkpoint_directory
from twotower.core import AnyRequest, Mode, ScoreRequest, ToldEvent
from twotower.engine.in_process import open_pair
from twotower.engine.pair import Pair

PORT = 8030
SETTINGS = {"cell": {"device": "cpu", "placement": "colocated", "max_sequences": 8, "capture": "off"}}


class Stay:
    """A run's stay on the pair."""

    cell = "pair"

    def __init__(self, events: AsyncGenerator[ToldEvent, None], model: ServedModel) -> None:
        self._events, self.fingerprint, self.vocabulary = events, model.fingerprint, model.vocabulary

    async def next(self) -> ToldEvent:
        return await anext(self._events)

    async def close(self) -> None:
        await self._events.aclose()


class OnePair:
    """Cells, as runs see them, of which there is one."""

    def __init__(self, pair: Pair, model: ServedModel) -> None:
        self._pair, self._model = pair, model

    async def place(self, request: AnyRequest, timeout_s: float, avoid: Set[str]) -> Stay:
        if isinstance(request, ScoreRequest):
            return Stay(self._score(request, timeout_s), self._model)
        return Stay(self._pair.events(request, timeout_s), self._model)

    async def _score(self, request: ScoreRequest, timeout_s: float) -> AsyncGenerator[ToldEvent, None]:
        yield await self._pair.score(request, timeout_s)

    def is_to_leave(self, cell: str, request: AnyRequest, fingerprint: str) -> bool:
        return False

    def elsewhere(self, request: AnyRequest, avoid: Set[str]) -> bool:
        return False

    def lacks(self, request: AnyRequest) -> bool:
        return False

    async def served(self) -> Set[Mode]:
        return frozenset(self._model.limits.modes)


async def serve(port: int) -> None:
    config = ServiceConfig.parse(SETTINGS)
    model = load_served_model(config)
    async with open_pair(checkpoint_directory(config.model.checkpoint), config.engine, "cpu") as pair:
        generation = Generation(model, OnePair(pair, model), default_timeout_s=config.ingress.request_timeout_s)
        app = make_app(generation, lambda: set(model.limits.modes), max_bytes=config.ingress.max_request_bytes)
        await uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, lifespan="off")).serve()


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(serve(int(sys.argv[1]) if len(sys.argv) > 1 else PORT))
