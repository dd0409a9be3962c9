"""A service's client for asyncio: the calls of `client`, with the same decisions."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, TypeVar, Unpack

from twotower_client.answers import Answer, Event, Finished, Gathering, ModelInfo, Readiness, Score
from twotower_client.asking import (
    Ask,
    Chat,
    Common,
    Message,
    Options,
    Prompt,
    ScoreAsk,
    StreamOptions,
    ask_of,
    checked_ids,
    checked_timeout,
    score_ask_of,
    scores_ask_of,
    text_or_chat,
)
from twotower_client.errors import ServiceError
from twotower_client.retrying import RetryPolicy, Tries
from twotower_client.target import Target, Tls, target_of

Told = TypeVar("Told")
_READY_S = 2.0


class AsyncFace(Protocol):
    """One way to a service."""

    async def complete(self, ask: Ask, timeout_s: float | None) -> Answer: ...
    def stream(self, ask: Ask, timeout_s: float | None) -> AsyncGenerator[Event, None]: ...
    async def score(self, ask: ScoreAsk, timeout_s: float | None) -> tuple[Score, ...]: ...
    async def tokenize(
        self, given: str | Chat, add_special_tokens: bool | None, timeout_s: float | None
    ) -> tuple[int, ...]: ...
    async def detokenize(self, token_ids: Sequence[int], timeout_s: float | None) -> str: ...
    async def model_info(self, timeout_s: float | None) -> ModelInfo: ...
    async def readiness(self, timeout_s: float | None) -> Readiness: ...
    async def is_alive(self, timeout_s: float | None) -> bool: ...
    async def close(self) -> None: ...


def async_face_of(target: Target) -> AsyncFace:
    """httpx2 is not loaded for gRPC, nor gRPC for HTTP."""
    if target.over_grpc:
        from twotower_client.grpc_face import AsyncGrpcFace

        return AsyncGrpcFace(target)
    from twotower_client.http_face import AsyncHttpFace

    return AsyncHttpFace(target)


class AsyncClient:
    """Asks the service at `url`, as `Client` does, with its settings. Belongs to the event loop of its first call."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        retry: RetryPolicy | None = None,
        timeout_s: float | None = None,
        use_proxies: bool = False,
        face: AsyncFace | None = None,
    ) -> None:
        self.target = target_of(url, api_key, tls, use_proxies)
        self.retry = retry or RetryPolicy()
        self.timeout_s = checked_timeout(timeout_s)
        self._face = face or async_face_of(self.target)
        self._sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
        self._draw = random.uniform

    async def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """The whole answer. Raises a ServiceError."""
        ask, timeout_s = ask_of(prompt, options)
        answer, attempts = await self._retried(lambda left_s: self._face.complete(ask, left_s), timeout_s)
        return answer.after(attempts)

    def stream(self, prompt: Prompt, **options: Unpack[StreamOptions]) -> "AsyncStream":
        """The answer as it is decoded. A failure before the first event is retried, never one after it."""
        ask, timeout_s = ask_of(prompt, options)
        return AsyncStream(self, ask, timeout_s or self.timeout_s)

    async def score(self, prompt: Prompt, continuation: Prompt, **options: Unpack[Common]) -> Score:
        """The continuation's log-probabilities under the context tower. Raises a ServiceError."""
        ask, timeout_s = score_ask_of(prompt, continuation, options)
        return (await self._retried(lambda left_s: self._face.score(ask, left_s), timeout_s))[0][0]

    async def scores(
        self, prompt: Prompt, continuations: Sequence[Prompt], **options: Unpack[Common]
    ) -> tuple[Score, ...]:
        """The scores of several continuations of one prompt, in order: all text, or all token ids. Each counts as a
        request. Raises a ServiceError.
        """
        ask, timeout_s = scores_ask_of(prompt, continuations, options)
        return (await self._retried(lambda left_s: self._face.score(ask, left_s), timeout_s))[0]

    async def tokenize(
        self,
        text: str | Sequence[Message],
        add_special_tokens: bool | None = None,
        timeout_s: float | None = None,
    ) -> tuple[int, ...]:
        """As Client.tokenize."""
        given = text_or_chat(text)
        told = self._retried(lambda left_s: self._face.tokenize(given, add_special_tokens, left_s), timeout_s)
        return (await told)[0]

    async def detokenize(self, token_ids: Sequence[int], timeout_s: float | None = None) -> str:
        """The text of token ids, special tokens written out. Raises a ServiceError."""
        ids = checked_ids(token_ids)
        return (await self._retried(lambda left_s: self._face.detokenize(ids, left_s), timeout_s))[0]

    async def model(self, timeout_s: float | None = None) -> ModelInfo:
        """The served model. Raises a ServiceError."""
        return (await self._retried(self._face.model_info, timeout_s))[0]

    async def is_alive(self, timeout_s: float = _READY_S) -> bool:
        """Whether a router of the service answers. Asked once."""
        try:
            return await self._face.is_alive(checked_timeout(timeout_s))
        except ServiceError:
            return False

    async def ready(self, timeout_s: float = _READY_S) -> Readiness:
        """Whether the service is ready, and which modes it serves. Asked once; without an answer it is not ready."""
        try:
            return await self._face.readiness(checked_timeout(timeout_s))
        except ServiceError as error:
            return Readiness(False, {}, str(error))

    async def close(self) -> None:
        await self._face.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _tries(self, timeout_s: float | None) -> Tries:
        return Tries(self.retry, timeout_s or self.timeout_s, self._draw)

    async def _retried(
        self, call: Callable[[float | None], Awaitable[Told]], timeout_s: float | None
    ) -> tuple[Told, int]:
        """The call's final result, and how often it was made."""
        tries = self._tries(checked_timeout(timeout_s))
        while True:
            try:
                return await call(tries.begin()), tries.made
            except ServiceError as error:
                pause_s = tries.pause_s(error)
            await self._sleep(pause_s)


class AsyncStream(AsyncIterator[Event]):
    """The events of an answer. Leaving the block, or `close`, gives the request up.

    `text` and `token_ids`: so far. `finished`: the end event, once it has arrived. `request_id`: the label in the
    service's log.
    """

    def __init__(self, client: AsyncClient, ask: Ask, timeout_s: float | None) -> None:
        self.request_id = ask.request_id
        self._gathering = Gathering(ask.request_id)
        self._events = self._generate(client, ask, timeout_s)

    async def _generate(self, client: AsyncClient, ask: Ask, timeout_s: float | None) -> AsyncGenerator[Event, None]:
        tries, streamed = client._tries(timeout_s), False
        while True:
            events = client._face.stream(ask, tries.begin())
            self._gathering.attempts = tries.made
            try:
                async for event in events:
                    streamed = True
                    self._gathering.add(event)
                    yield event
                return
            except ServiceError as error:
                pause_s = tries.pause_s(error, streamed)
            finally:
                await events.aclose()
            await client._sleep(pause_s)

    @property
    def text(self) -> str:
        return self._gathering.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self._gathering.token_ids

    @property
    def finished(self) -> Finished | None:
        return self._gathering.finished

    async def rest(self) -> Answer:
        """Reads on to the end: the whole answer. Raises a ServiceError."""
        async for _ in self:
            pass
        return self._gathering.answer()

    async def close(self) -> None:
        await self._events.aclose()

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
