"""The trace on both faces over scripted cells: events of their own, which a client that does not ask never sees."""

import json
from typing import Any

import grpc
import httpx
import pytest

from tests.cluster.fakes import ScriptedCells, tokens
from tests.cluster.test_grpc import Stub, ask
from tests.cluster.test_http import TEXT, complete, events_of
from twotower.core import AnyRequest
from twotower.errors import Unavailable
from twotower.pb.twotower.v1 import generation_pb2 as pb

DIFFUSION = {"mode": "diffusion", "trace": True}
VERIFIED = {"mode": "verified", "trace": True}


def named_events(body: str) -> list[tuple[str, Any]]:
    """Every server-sent event but [DONE]: its name, empty where it has none, and its JSON."""
    found = []
    for event in body.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]:
        *names, data = event.splitlines()
        found.append(("".join(name.removeprefix("event: ") for name in names), json.loads(data.removeprefix("data: "))))
    return found


async def test_over_http_steps_are_named_events_between_the_blocks(http: httpx.AsyncClient) -> None:
    plain = await complete(http, stream=True, seed=1, diffusion={"mode": "diffusion", "trace": False}, max_tokens=6)
    response = await complete(http, stream=True, seed=1, diffusion=DIFFUSION, max_tokens=6)
    events = named_events(response.text)
    assert [name for name, _ in events] == ["twotower.trace", "twotower.trace", ""] * 2
    first, second = events[0][1], events[4][1]
    assert first["choices"] == [] and first["index"] == 0 and first["object"] == "twotower.trace"
    assert first["step"] == {
        "start": 0,
        "size": 4,
        "step": 0,
        "positions": [0, 2],
        "token_ids": list(tokens("Al")),
        "texts": ["A", "l"],
        "confidence": [0.5, 0.5],
    }
    assert second["step"]["positions"] == [5] and second["step"]["texts"] == ["o"] and second["step"]["step"] == 1
    without = [body["choices"] for name, body in events if not name]
    assert "twotower" not in plain.text
    assert without == [event["choices"] for event in events_of(plain.text)[:-1]]
    assert response.text.endswith("data: [DONE]\n\n")


async def test_over_grpc_steps_are_events_between_the_blocks(stub: Stub) -> None:
    params = pb.DecodingParams(mode=pb.MODE_DIFFUSION, max_new_tokens=6)
    events = [event async for event in stub.GenerateStream(ask(params=params, trace=True))]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["step", "step", "block"] * 2 + ["finished"]
    assert events[0].step == pb.Step(
        start=0, size=4, step=0, positions=[0, 2], token_ids=tokens("Al"), texts=["A", "l"], confidence=[0.5, 0.5]
    )
    untraced = [event async for event in stub.GenerateStream(ask(params=params))]
    assert [event.WhichOneof("event") for event in untraced] == ["block", "block", "finished"]


async def test_in_verified_the_verdict_is_told(http: httpx.AsyncClient, stub: Stub) -> None:
    events = named_events((await complete(http, stream=True, diffusion=VERIFIED, max_tokens=4)).text)
    [verdict] = [body["round"] for _, body in events if "round" in body]
    assert verdict == {
        "start": 0,
        "draft": list(tokens("All\x1f")),
        "draft_texts": ["A", "l", "l", "\x1f"],
        "num_accepted": 3,
        "token_id": tokens(" ")[0],
        "text": " ",
    }
    params = pb.DecodingParams(mode=pb.MODE_VERIFIED, max_new_tokens=4)
    rounds = [
        e.round for e in [e async for e in stub.GenerateStream(ask(params=params, trace=True))] if e.HasField("round")
    ]
    assert [(list(r.draft), r.num_accepted, r.token_id, r.text) for r in rounds] == [
        (verdict["draft"], 3, verdict["token_id"], " ")
    ]


async def test_each_prompt_of_a_call_has_its_own(http: httpx.AsyncClient) -> None:
    response = await complete(http, prompt=["a", "b"], stream=True, diffusion=DIFFUSION, max_tokens=4)
    places = [body["index"] for name, body in named_events(response.text) if name]
    assert sorted(places) == [0, 0, 1, 1]


async def test_a_request_that_goes_on_elsewhere_tells_no_step_twice(
    http: httpx.AsyncClient, cells: ScriptedCells
) -> None:
    undisturbed = (await complete(http, stream=True, seed=1, diffusion=VERIFIED)).text
    died: list[int] = []

    def die(request: AnyRequest, block: int) -> None:
        if block in (0, 2) and block not in died:
            died.append(block)
            raise Unavailable("the cell is gone")

    cells.fail = die
    resumed = (await complete(http, stream=True, seed=1, diffusion=VERIFIED)).text
    assert died == [0, 2] and TEXT[:4] in resumed

    def traced(body: str) -> list[Any]:
        return [(b.get("step"), b.get("round"), [c["token_ids"] for c in b["choices"]]) for _, b in named_events(body)]

    assert traced(resumed) == traced(undisturbed)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stream": True, "diffusion": {"mode": "ar", "trace": True}}, "trace is not supported in ar mode"),
        ({"stream": True, "diffusion": {"mode": "mock_ar", "trace": True}}, "trace is not supported in mock_ar mode"),
        ({"stream": True, "diffusion": {"trace": "yes"}}, "diffusion.trace: got 'yes', wanted true or false"),
        ({"diffusion": {"trace": True}}, "diffusion.trace: got true, wanted it only with stream: true"),
        ({"stream": True, "trace": True}, "trace: unknown field; did you mean diffusion.trace?"),
    ],
)
async def test_over_http_it_is_refused_by_name_where_it_means_nothing(
    http: httpx.AsyncClient, cells: ScriptedCells, fields: dict[str, Any], said: str
) -> None:
    response = await complete(http, **fields)
    assert response.status_code == 400 and said in response.json()["error"]["message"], response.text
    assert not cells.requests


async def test_over_grpc_it_is_refused_by_name_where_it_means_nothing(stub: Stub, cells: ScriptedCells) -> None:
    in_ar = stub.GenerateStream(ask(params=pb.DecodingParams(mode=pb.MODE_AR), trace=True))
    for call, said in ((in_ar.read(), "not supported in ar mode"), (stub.Generate(ask(trace=True)), "GenerateStream")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and said in (caught.value.details() or "")
    assert not cells.requests
