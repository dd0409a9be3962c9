"""`up` that is told to stop while requests run: what they, new ones and the machine see of it."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import psutil
import pytest
from google.rpc import error_details_pb2

from benchmarks.reference.service import free_port
from tests.cluster.test_grpc import details_of
from tests.cluster.up_process import UpProcess
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

LONGEST = 60_000
SETTINGS = (
    "cell.placement=colocated",
    "cell.device=cpu",
    "cell.max_sequences=4",
    f"model.max_sequence_length={LONGEST}",
)
OF_OLD_S = 15.0  # after which Serve cut what ran, whatever was configured
ENOUGH_S = 18.0  # of one stream alone; two at once take longer
PROMPT = [5, 6, 7]
ROUTER = "ray::ServeReplica:twotower:Router"
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]  # of two routers on one port any gets it
BODY: dict[str, Any] = {"prompt": PROMPT, "ignore_eos": True, "diffusion": {"confidence_threshold": 1.0}}


@asynccontextmanager
async def running(*settings: str) -> AsyncIterator[UpProcess]:
    """A ready `up` and all its processes; in the end nothing of them is left, whatever became of it."""
    up = UpProcess(free_port(), free_port(), *SETTINGS, *settings)
    try:
        await asyncio.to_thread(up.wait_until_ready)
        processes = up.processes()
        assert len(processes) > 8
        yield up
        await asyncio.to_thread(_nothing_is_left, processes)
    finally:
        if up.process.poll() is None:
            up.stop()


def _nothing_is_left(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


async def _tokens_that_last(up: UpProcess, seconds: float) -> int:
    """Of two streams at once on this machine; at least so long."""
    probe = 400
    await asyncio.to_thread(up.ask, **BODY, max_tokens=probe)
    began = time.monotonic()
    await asyncio.to_thread(up.ask, **BODY, max_tokens=probe)
    return min(LONGEST - 100, int(probe * seconds / (time.monotonic() - began)))


class Streams:
    """One over HTTP and one over gRPC, read to their ends."""

    def __init__(self, up: UpProcess, tokens: int) -> None:
        self._up, self._tokens = up, tokens
        self.http_tokens = self.grpc_tokens = 0
        self.last: dict[str, Any] | str = ""
        self.grpc_error: grpc.aio.AioRpcError | None = None
        self._reading = [asyncio.create_task(self._http()), asyncio.create_task(self._grpc())]

    async def begun(self) -> None:
        while not (self.http_tokens and self.grpc_tokens):
            assert not any(task.done() for task in self._reading)
            await asyncio.sleep(0.02)

    async def ended(self) -> None:
        await asyncio.gather(*self._reading)

    async def _http(self) -> None:
        body = BODY | {"max_tokens": self._tokens, "stream": True}
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._up.http}", timeout=120) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            async for line in response.aiter_lines():
                if line:
                    data = line.removeprefix("data: ")
                    self.last = data if data == "[DONE]" else json.loads(data)
                    if isinstance(self.last, dict) and "choices" in self.last:
                        self.http_tokens += len(self.last["choices"][0]["token_ids"])

    async def _grpc(self) -> None:
        params = pb.DecodingParams(max_new_tokens=self._tokens, ignore_eos=True, confidence_threshold=1.0)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), params=params)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self._up.grpc}", OWN_CONNECTION) as channel:
            try:
                async for event in pb_grpc.GenerationServiceStub(channel).GenerateStream(request):
                    self.grpc_tokens += len(event.block.token_ids)
            except grpc.aio.AioRpcError as error:
                self.grpc_error = error

    def were_told(self) -> None:
        """Both end early, with an error of ours instead of a reset."""
        assert isinstance(self.last, dict) and self.last["error"]["type"] == "unavailable_error", self.last
        assert "the service has shut down" in self.last["error"]["message"]
        assert self.grpc_error is not None and self.grpc_error.code() is grpc.StatusCode.UNAVAILABLE
        assert "the service has shut down" in (self.grpc_error.details() or "")
        assert max(self.http_tokens, self.grpc_tokens) < self._tokens


async def test_streams_end_whole_and_new_requests_are_refused() -> None:
    async with running("cluster.drain_timeout_s=300") as up:
        tokens = await _tokens_that_last(up, ENOUGH_S)
        streams = Streams(up, tokens)
        await streams.begun()
        up.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        await asyncio.to_thread(up.wait_until_it_says, "finishing the running requests, for 300 s at most")
        await refused(up)
        await streams.ended()
        lasted_s = time.monotonic() - began
        assert streams.last == "[DONE]" and streams.grpc_error is None
        assert (streams.http_tokens, streams.grpc_tokens) == (tokens, tokens)
        assert lasted_s > OF_OLD_S, "too short to tell"
        assert await asyncio.to_thread(up.ended) == 0 and "Traceback" not in up.said, up.said


async def test_what_is_left_when_time_is_up_is_told() -> None:
    """By both routers."""
    async with running("cluster.drain_timeout_s=4", "cluster.num_routers=2", "cell.max_sequences=8") as up:
        assert len(_routers(up)) == 2
        many = [Streams(up, LONGEST - 100) for _ in range(4)]
        for streams in many:
            await streams.begun()
        up.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(up.wait_until_it_says, "finishing the running requests, for 4 s at most")
        for _ in range(3):
            await refused(up)
        async with asyncio.timeout(60):
            for streams in many:
                await streams.ended()
        for streams in many:
            streams.were_told()
        assert await asyncio.to_thread(up.ended) == 0 and "Traceback" not in up.said, up.said


def _routers(up: UpProcess) -> list[psutil.Process]:
    return [process for process in up.processes() if "".join(process.cmdline()[:1]).startswith(ROUTER)]


async def refused(up: UpProcess) -> None:
    """Over both faces, with a hint."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{up.http}", timeout=30) as client:
        answer = await client.post("/v1/completions", json={"prompt": PROMPT})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1, answer.text
    async with grpc.aio.insecure_channel(f"127.0.0.1:{up.grpc}", OWN_CONNECTION) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.GenerationServiceStub(channel).Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT)))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details_of(caught.value, error_details_pb2.RetryInfo) is not None
