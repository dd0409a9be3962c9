"""The gRPC face over a channel, blocking and with asyncio. `grpc_codec` reads and writes the messages."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any

import grpc
import grpc.aio

from twotower_client.answers import Answer, Event, ModelInfo, Readiness, Score
from twotower_client.asking import MODES, Ask, Chat, ScoreAsk
from twotower_client.errors import NotFound, ServiceError
from twotower_client.grpc_codec import (
    Rpc,
    Told,
    detokenize_rpc,
    error_from,
    generate_rpc,
    health_rpc,
    model_info_rpc,
    score_rpc,
    service_id_in,
    stream_rpc,
    tokenize_rpc,
)
from twotower_client.target import Target
from twotower_client.tls_mistakes import explained

LARGEST_ANSWER = 64 * 2**20  # bytes: enough for the longest likelihoods of an answer
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", LARGEST_ANSWER),
    # Detects a host that vanished silently. The service accepts a ping every 5 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Each client has a connection of its own, so that clients reach several routers.
    ("grpc.use_local_subchannel_pool", 1),
    # Until a channel reconnects, all calls fail with its last error. By default this wait grows to two minutes.
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


def _channel(target: Target, insecure: Any, secure: Any) -> Any:
    options = [*_OPTIONS, ("grpc.enable_http_proxy", int(target.use_proxies))]
    if not target.secure:
        return insecure(target.address, options=options)
    if target.tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", target.tls.server_name))
    roots, key, certificate = target.tls.read()
    return secure(target.address, grpc.ssl_channel_credentials(roots, key, certificate), options=options)


def _told(error: Any, request_id: str) -> ServiceError:
    return error_from(error.code(), error.details() or "", error.trailing_metadata() or (), request_id)


def _ends_at(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


def _left_s(ends_at: float | None) -> float | None:
    return None if ends_at is None else ends_at - time.monotonic()


class GrpcFace:
    """Blocking calls over gRPC, safe from several threads."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._channel = _channel(target, grpc.insecure_channel, grpc.secure_channel)
        self._metadata = target.credentials

    def complete(self, ask: Ask, timeout_s: float | None) -> Answer:
        return self._call(generate_rpc(ask), timeout_s)

    def score(self, ask: ScoreAsk, timeout_s: float | None) -> tuple[Score, ...]:
        return self._call(score_rpc(ask), timeout_s)

    def tokenize(self, given: str | Chat, add_special_tokens: bool | None, timeout_s: float | None) -> tuple[int, ...]:
        return self._call(tokenize_rpc(given, add_special_tokens), timeout_s)

    def detokenize(self, token_ids: Sequence[int], timeout_s: float | None) -> str:
        return self._call(detokenize_rpc(token_ids), timeout_s)

    def model_info(self, timeout_s: float | None) -> ModelInfo:
        return self._call(model_info_rpc(), timeout_s)

    def readiness(self, timeout_s: float | None) -> Readiness:
        modes: dict[str, bool] = {}
        for mode in MODES:
            with contextlib.suppress(NotFound):
                modes[mode] = self._call(health_rpc(mode), timeout_s)
        return readiness_of(self._call(health_rpc(), timeout_s), modes)

    def is_alive(self, timeout_s: float | None) -> bool:
        self._call(health_rpc(), timeout_s)
        return True

    def stream(self, ask: Ask, timeout_s: float | None) -> Generator[Event, None, None]:
        rpc, ends_at, streamed = stream_rpc(ask), _ends_at(timeout_s), False
        call = self._channel.unary_stream(rpc.path)(rpc.message, timeout=timeout_s, metadata=self._metadata)
        try:
            for data in call:
                streamed = True
                yield rpc.read(data, "")
        except grpc.RpcError as error:
            known = _told(error, rpc.request_id)
            raise (known if streamed else self._why(known, ends_at)) from None
        finally:
            call.cancel()

    def close(self) -> None:
        self._channel.close()

    def _call(self, rpc: Rpc[Told], timeout_s: float | None) -> Told:
        ends_at = _ends_at(timeout_s)
        try:
            method = self._channel.unary_unary(rpc.path)
            data, call = method.with_call(rpc.message, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._why(_told(error, rpc.request_id), ends_at) from None
        return rpc.read(data, service_id_in(call.trailing_metadata()))

    def _why(self, error: ServiceError, ends_at: float | None) -> ServiceError:
        return explained(self._target, error, _left_s(ends_at))


class AsyncGrpcFace:
    """Calls over gRPC with asyncio, on the loop of the first call."""

    def __init__(self, target: Target) -> None:
        self._target = target
        if target.secure:
            target.tls.read()  # fails now if a file is wrong
        self._metadata = target.credentials
        self._opened: Any = None

    async def complete(self, ask: Ask, timeout_s: float | None) -> Answer:
        return await self._call(generate_rpc(ask), timeout_s)

    async def score(self, ask: ScoreAsk, timeout_s: float | None) -> tuple[Score, ...]:
        return await self._call(score_rpc(ask), timeout_s)

    async def tokenize(
        self, given: str | Chat, add_special_tokens: bool | None, timeout_s: float | None
    ) -> tuple[int, ...]:
        return await self._call(tokenize_rpc(given, add_special_tokens), timeout_s)

    async def detokenize(self, token_ids: Sequence[int], timeout_s: float | None) -> str:
        return await self._call(detokenize_rpc(token_ids), timeout_s)

    async def model_info(self, timeout_s: float | None) -> ModelInfo:
        return await self._call(model_info_rpc(), timeout_s)

    async def readiness(self, timeout_s: float | None) -> Readiness:
        modes: dict[str, bool] = {}
        for mode in MODES:
            with contextlib.suppress(NotFound):
                modes[mode] = await self._call(health_rpc(mode), timeout_s)
        return readiness_of(await self._call(health_rpc(), timeout_s), modes)

    async def is_alive(self, timeout_s: float | None) -> bool:
        await self._call(health_rpc(), timeout_s)
        return True

    async def stream(self, ask: Ask, timeout_s: float | None) -> AsyncGenerator[Event, None]:
        rpc, ends_at, streamed = stream_rpc(ask), _ends_at(timeout_s), False
        call = self._channel.unary_stream(rpc.path)(rpc.message, timeout=timeout_s, metadata=self._metadata)
        try:
            async for data in call:
                streamed = True
                yield rpc.read(data, "")
        except grpc.aio.AioRpcError as error:
            known = _told(error, rpc.request_id)
            raise (known if streamed else await self._why(known, ends_at)) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()

    @property
    def _channel(self) -> Any:
        if self._opened is None:
            self._opened = _channel(self._target, grpc.aio.insecure_channel, grpc.aio.secure_channel)
        return self._opened

    async def _call(self, rpc: Rpc[Told], timeout_s: float | None) -> Told:
        ends_at = _ends_at(timeout_s)
        call = self._channel.unary_unary(rpc.path)(rpc.message, timeout=timeout_s, metadata=self._metadata)
        try:
            data = await call
            return rpc.read(data, service_id_in(await call.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            raise await self._why(_told(error, rpc.request_id), ends_at) from None

    async def _why(self, error: ServiceError, ends_at: float | None) -> ServiceError:
        return await asyncio.to_thread(explained, self._target, error, _left_s(ends_at))


def readiness_of(serves: bool, modes: dict[str, bool]) -> Readiness:
    return Readiness(serves, modes, "" if serves else "no cell serves now")
