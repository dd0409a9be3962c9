"""Every path gives the same tokens, and the driver counts what the clients got."""

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from benchmarks.reference.driver import Measured, drive
from benchmarks.reference.forwards import compare_forwards
from benchmarks.reference.paths import InProcessPath, NaivePath, Path, ServedPath
from benchmarks.reference.workload import Workload
from tests.goldens import MODELS, Golden, golden
from twotower.core import Mode, Request
from twotower.engine.settings import EngineSettings
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1.generation_pb2_grpc import (
    GenerationServiceServicer,
    add_GenerationServiceServicer_to_server,
)

SETTINGS = EngineSettings(max_sequences=4, max_sequence_length=256)


@pytest.fixture
def model() -> Golden:
    return golden(MODELS[0])


def _requests(model: Golden, mode: Mode, number: int) -> list[Request]:
    return Workload(model.checkpoint, 16, 0.8, ignore_eos=True).requests(mode, number, "r")


async def _drive(path: Path, requests: list[Request]) -> Measured:
    return await drive(path, [], requests, 3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.AUTO])  # a script has no load
async def test_naive_and_in_process_give_the_same_tokens(model: Golden, mode: Mode) -> None:
    requests = _requests(model, mode, 5)
    naive = await _drive(NaivePath(model.context, model.denoiser, 1), requests)
    ours = await _drive(InProcessPath(model.context, model.denoiser, SETTINGS, 1), requests)
    assert [a.token_ids for a in ours.answers] == [a.token_ids for a in naive.answers]
    assert naive.num_tokens == 5 * 16
    if mode is Mode.VERIFIED:  # the script drafts every round, the engine leaves out drafts that do not pay
        assert naive.tokens_per_step and ours.tokens_per_step and naive.tokens_per_step <= ours.tokens_per_step
    else:
        assert naive.tokens_per_step == ours.tokens_per_step
    assert (naive.tokens_per_step is None) is (mode is Mode.AR)


async def test_the_naive_path_serves_one_after_the_other(model: Golden) -> None:
    measured = await _drive(NaivePath(model.context, model.denoiser, 1), _requests(model, Mode.AR, 3))
    first, second, third = (answer.arrivals for answer in measured.answers)
    assert first[-1] < second[0] < second[-1] < third[0]


class _Echo(GenerationServiceServicer):
    """Answers a prompt with itself, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.asked.append(request)
        block = pb.CommittedBlock(token_ids=request.token_ids.ids, num_steps=2, num_blocks=1)
        yield pb.GenerateStreamResponse(request_id=request.request_id, block=block)
        yield pb.GenerateStreamResponse(request_id=request.request_id, finished=pb.Finished())


async def test_the_served_path_speaks_our_protocol(model: Golden) -> None:
    server, echo = grpc.aio.server(), _Echo()
    add_GenerationServiceServicer_to_server(echo, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    [diffusion], [ar] = _requests(model, Mode.DIFFUSION, 1), _requests(model, Mode.AR, 1)
    measured = await _drive(ServedPath(f"127.0.0.1:{port}"), [diffusion, ar])
    await server.stop(None)
    assert [tuple(answer.token_ids) for answer in measured.answers] == [diffusion.prompt_token_ids, ar.prompt_token_ids]
    asked = {request.params.mode: request.params for request in echo.asked}
    assert asked[pb.MODE_DIFFUSION].block_size == 16 and asked[pb.MODE_DIFFUSION].confidence_threshold == 0.8
    assert not asked[pb.MODE_AR].HasField("block_size")
    assert all(params.max_new_tokens == 16 and params.ignore_eos for params in asked.values())


@pytest.mark.slow
def test_tower_passes_are_timed_on_both_sides(model: Golden) -> None:
    times = compare_forwards(model.context, model.denoiser, 20, 2)
    assert [time.name.split(" [")[0] for time in times] == ["denoiser step", "commit", "AR step", "prompt"]
    assert all(len(time.ours) == len(time.naive) == 2 and time.ratio > 0 for time in times)


def test_prompts_are_the_same_for_every_path(model: Golden) -> None:
    one, other = (_requests(model, mode, 3) for mode in (Mode.AR, Mode.DIFFUSION))
    assert [r.prompt_token_ids for r in one] == [r.prompt_token_ids for r in other]
    assert len({r.prompt_token_ids for r in one}) == 3
