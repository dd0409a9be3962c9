"""The gRPC face over a channel, blocking and with asyncio. Decides nothing: `grpc_codec` reads and writes."""

import contextlib
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

LARGEST_ANSWER = 64 * 2**20  # bytes: the longest likelihoods that the service tells fit in
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", LARGEST_ANSWER),
    # A host that is gone without a word is found; the service takes a ping every 5 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Until a channel tries to connect again all calls fail with its last error. By default that grows to two minutes.
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


class GrpcFace:
    """Blocking. Calls may come from several threads."""

    def __init__(self, target: Target) -> None:
        self._channel = _channel(target, grpc.insecure_channel, grpc.secure_channel)
        self._metadata = target.credentials

    def complete(self, ask: Ask, timeout_s: float | None) -> Answer:
        return self._call(generate_rpc(ask), timeout_s)

    def score(self, ask: ScoreAsk, timeout_s: float | None) -> Score:
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
        rpc = stream_rpc(ask)
        call = self._channel.unary_stream(rpc.path)(rpc.message, timeout=timeout_s, metadata=self._metadata)
        try:
            for data in call:
                yield rpc.read(data, "")
        except grpc.RpcError as error:
            raise _told(error, rpc.request_id) from None
        finally:
            call.cancel()

    def close(self) -> None:
        self._channel.close()

    def _call(self, rpc: Rpc[Told], timeout_s: float | None) -> Told:
        try:
            method = self._channel.unary_unary(rpc.path)
            data, call = method.with_call(rpc.message, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _told(error, rpc.request_id) from None
        return rpc.read(data, service_id_in(call.trailing_metadata()))


class AsyncGrpcFace:
    """With asyncio, on the loop of its first call."""

    def __init__(self, target: Target) -> None:
        self._target = target
        if target.secure:
            target.tls.read()  # a wrong file is told now
        self._metadata = target.credentials
        self._opened: Any = None

    async def complete(self, ask: Ask, timeout_s: float | None) -> Answer:
        return await self._call(generate_rpc(ask), timeout_s)

    async def score(self, ask: ScoreAsk, timeout_s: float | None) -> Score:
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
        rpc = stream_rpc(ask)
        call = self._channel.unary_stream(rpc.path)(rpc.message, timeout=timeout_s, metadata=self._metadata)
        try:
            async for data in call:
                yield rpc.read(data, "")
        except grpc.aio.AioRpcError as error:
            raise _told(error, rpc.request_id) from None
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
        call = self._channel.unary_unary(rpc.path)(rpc.message, timeout=timeout_s, metadata=self._metadata)
        try:
            data = await call
            return rpc.read(data, service_id_in(await call.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            raise _told(error, rpc.request_id) from None


def readiness_of(serves: bool, modes: dict[str, bool]) -> Readiness:
    return Readiness(serves, modes, "" if serves else "no cell serves now")
