"""Tokens of a prompt that a cell need not read: told over both faces, and shared with nobody who has another key."""

import grpc
import httpx
import pytest

from cluster.runs.answer import Usage
from cluster.runs.callers import Caller
from cluster.runs.deadline import Deadline
from cluster.runs.generation import Ask, Generation, ScoreAsk
from tests.cluster.fakes import ScriptedCells, generation
from tests.cluster.test_http import complete, events_of
from twotower.core import BlockEvent, RequestId
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

CACHED = {"cached_tokens": 2}


@pytest.fixture
def cells() -> ScriptedCells:
    cells = ScriptedCells()
    cells.cached = 2
    return cells


async def test_http_tells_as_openai_does_once_for_each_prompt(http: httpx.AsyncClient) -> None:
    assert (await complete(http)).json()["usage"]["prompt_tokens_details"] == CACHED
    several = (await complete(http, prompt=["Hi", "Ho"], n=3)).json()["usage"]
    assert (several["prompt_tokens"], several["prompt_tokens_details"]) == (6, {"cached_tokens": 4})


async def test_streams_and_chats_tell_it(http: httpx.AsyncClient) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *_, told, _ = events_of((await complete(http, **options)).text)
    assert told["usage"]["prompt_tokens_details"] == CACHED
    chat = await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert chat.json()["usage"]["prompt_tokens_details"] == CACHED


async def test_scores_tell_it(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
    told = (await http.post("/v1/score", json={"prompt": "Hi", "continuation": " there"})).json()
    assert told["prompt_tokens_details"] == CACHED
    ask = pb.ScoreRequest(prompt_text="Hi", continuation_text=" there")
    assert (await pb_grpc.GenerationServiceStub(channel).Score(ask)).cached_tokens == 2


async def test_grpc_tells_it(channel: grpc.aio.Channel) -> None:
    stub, ask = pb_grpc.GenerationServiceStub(channel), pb.GenerateRequest(text="Hi", n=2)
    whole = await stub.Generate(ask)
    assert whole.finished.usage.cached_tokens == whole.total_usage.cached_tokens == 2
    ends = [event.finished async for event in stub.GenerateStream(ask) if event.HasField("finished")]
    assert [end.usage.cached_tokens for end in ends] == [2, 2]


@pytest.mark.parametrize(
    ("caller", "salt"), [(Caller("10.0.0.1"), ""), (Caller("a", has_key=True), "a"), (Caller("b", has_key=True), "b")]
)
async def test_each_key_has_prefixes_of_its_own(cells: ScriptedCells, caller: Caller, salt: str) -> None:
    service: Generation = generation(cells)
    run = await service.run(service.check(Ask("Hi")), Deadline.after(10), caller)
    scoring = await service.score_run(service.check_score(ScoreAsk("Hi", " there")), Deadline.after(10), caller)
    assert (run.request.cache_salt, scoring.request.cache_salt) == (salt, salt)


def test_a_resumed_answer_tells_what_was_cached_where_it_began() -> None:
    began, went_on = (BlockEvent(RequestId("r"), start, (5,), 1, 1, cached_tokens=7) for start in (0, 1))
    assert Usage(9).plus(began).plus(went_on).cached_tokens == 7
