"""Each of the four clients before the service's real faces over scripted cells."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from cluster.faces.http.service import make_app
from tests.cluster.fakes import ScriptedCells, generation, grpc_server
from twotower_client import Answer, AsyncClient, Client, Event, ModelInfo, Readiness, RetryPolicy, Score

FACES = ("grpc", "http")
# No test waits for luck: pauses are noted, not slept.
PROMPT_RETRIES = RetryPolicy(attempts=3, first_s=0.25, factor=2, longest_s=1)


class Asking:
    """A client, blocking or not, as a test awaits it. `pauses`: what it would have slept."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client: Any = client
        self.pauses: list[float] = []
        self.blocks = isinstance(client, Client)
        client._draw = lambda low, high: high
        if self.blocks:
            self.client._sleep = self.pauses.append
        else:
            self.client._sleep = self._slept

    async def _slept(self, pause_s: float) -> None:
        self.pauses.append(pause_s)

    async def complete(self, *arguments: Any, **options: Any) -> Answer:
        return await self.of("complete", *arguments, **options)  # type: ignore[no-any-return]

    async def score(self, *arguments: Any, **options: Any) -> Score:
        return await self.of("score", *arguments, **options)  # type: ignore[no-any-return]

    async def model(self) -> ModelInfo:
        return await self.of("model")  # type: ignore[no-any-return]

    async def ready(self) -> Readiness:
        return await self.of("ready")  # type: ignore[no-any-return]

    async def is_alive(self) -> bool:
        return await self.of("is_alive")  # type: ignore[no-any-return]

    async def of(self, name: str, *arguments: Any, **options: Any) -> Any:
        method = getattr(self.client, name)
        if self.blocks:
            return await asyncio.to_thread(method, *arguments, **options)
        return await method(*arguments, **options)

    async def stream(self, *arguments: Any, most: int | None = None, **options: Any) -> tuple[list[Event], Any]:
        """The first events of a stream, all where `most` is None, and the stream itself, closed."""
        stream, events = self.client.stream(*arguments, **options), list[Event]()
        await self.read(stream, events, most)
        return events, stream

    async def read(self, stream: Any, events: list[Event], most: int | None = None) -> None:
        if self.blocks:
            await asyncio.to_thread(self._read, stream, events, most)
            return
        async with stream:
            async for event in stream:
                events.append(event)
                if len(events) == most:
                    return

    def _read(self, stream: Any, events: list[Event], most: int | None) -> None:
        with stream:
            for event in stream:
                events.append(event)
                if len(events) == most:
                    return

    async def close(self) -> None:
        await self.of("close")


@asynccontextmanager
async def http_server(app: Any, context: ssl.SSLContext | None = None) -> AsyncGenerator[str, None]:
    """The app on a free loopback port, by uvicorn's protocol without its loop, which ends after tenths of a second."""
    config = uvicorn.Config(app, log_level="error", lifespan="off")
    config.load()
    state = ServerState()

    def connection() -> Any:
        protocol: Any = config.http_protocol_class
        return protocol(config=config, server_state=state, app_state={})

    server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0, ssl=context)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for one in list(state.connections):
            one.shutdown()


@pytest.fixture(
    params=[(kind, face) for kind in (Client, AsyncClient) for face in FACES], ids=lambda p: f"{p[0].__name__}-{p[1]}"
)
async def asking(request: pytest.FixtureRequest, cells: ScriptedCells) -> AsyncGenerator[Asking, None]:
    kind, face = request.param
    async with AsyncExitStack() as opened:
        make = await opened.enter_async_context(serving(face, cells))
        asking = Asking(make(kind, retry=PROMPT_RETRIES))
        yield asking
        await asking.close()


@asynccontextmanager
async def serving(face: str, cells: ScriptedCells) -> AsyncGenerator[Callable[..., Client | AsyncClient], None]:
    """What makes clients of a service over this face."""
    if face == "grpc":
        async with grpc_server(generation(cells)) as (address, _):
            yield lambda kind, **settings: kind(f"grpc://{address}", **settings)
    else:
        app = make_app(generation(cells), lambda: cells.serves if cells.is_ready else set(), max_bytes=10_000)
        async with http_server(app) as address:
            yield lambda kind, **settings: kind(f"http://{address}", **settings)


@pytest.fixture
def cells() -> ScriptedCells:
    return ScriptedCells()
