"""Two `up --address` on one Ray and one machine: the second takes the first one's place and cuts no stream."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from benchmarks.reference.service import free_port
from tests.cluster.test_stopping import refused
from tests.cluster.up_process import UpProcess

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

PROMPTS, TOKENS = 4, 400  # one prompt after the other, which takes seconds
SETTINGS = ("cell.placement=colocated", "cell.device=cpu", "cell.max_sequences=2")
LONG: dict[str, Any] = {
    "prompt": [[5 + number, 6, 7] for number in range(PROMPTS)],
    "max_tokens": TOKENS,
    "ignore_eos": True,
    "stream": True,
    "diffusion": {"confidence_threshold": 1.0},
}


async def test_the_second_takes_the_place_of_the_first(ray_cluster: None) -> None:
    import ray

    flags, ports = ("--address", ray.get_runtime_context().gcs_address), (free_port(), free_port())
    first = UpProcess(*ports, *SETTINGS, flags=flags)
    second = None
    try:
        await asyncio.to_thread(first.wait_until_ready)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports[0]}", timeout=120) as http:
            callers = [Caller(http), Caller(http)]
            calling = [asyncio.create_task(callers[0].call())]
            await callers[0].is_half_through.wait()
            calling.append(asyncio.create_task(callers[1].call()))  # so that one has always half of a stream to come
            second = UpProcess(*ports, *SETTINGS, flags=(*flags, "--replace"))
            await asyncio.to_thread(second.wait_until_it_says, "finishing the running requests, for 600 s at most")
            assert not all(task.done() for task in calling)
            await refused(first)
            await asyncio.gather(*calling)
            assert all(caller.streams for caller in callers)
        assert await asyncio.to_thread(first.ended) == 1
        assert "this `up` has lost its application: another `up` has replaced it" in first.said, first.said
        await asyncio.to_thread(second.wait_until_ready)
        assert len((await asyncio.to_thread(second.ask))["choices"][0]["token_ids"]) == 20
        assert await asyncio.to_thread(second.stop) == 0
        from ray import serve

        assert not serve.status().applications
    finally:
        for up in (first, second):
            if up is not None and up.process.poll() is None:
                up.stop()
        await asyncio.to_thread(_end_serve)


class Caller:
    """Asks for one stream after the other, until the service refuses more. Each must end whole."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http, self.streams, self.is_half_through = http, 0, asyncio.Event()

    async def call(self) -> None:
        while True:
            async with self._http.stream("POST", "/v1/completions", json=LONG) as response:
                if response.status_code == 503:
                    return
                assert await self._tokens(response.aiter_lines()) == dict.fromkeys(range(PROMPTS), TOKENS)
                self.streams += 1

    async def _tokens(self, lines: AsyncIterator[str]) -> dict[int, int]:
        """How many tokens each answer has, once the stream has ended."""
        tokens, last = Counter[int](), ""
        async for last in lines:
            if last.startswith("data: {"):
                for choice in json.loads(last.removeprefix("data: "))["choices"]:
                    tokens[choice["index"]] += len(choice["token_ids"])
            if tokens.total() >= PROMPTS * TOKENS // 2:
                self.is_half_through.set()
            if last == "data: [DONE]":
                return dict(tokens)
        raise AssertionError(f"the stream ended with {last!r}")


def _end_serve() -> None:
    from ray import serve

    serve.shutdown()
