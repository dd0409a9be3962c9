"""`logprobs` over both faces: OpenAI's shape, the same tokens as the answer's, whole and streamed."""

from typing import Any

import httpx
import pytest

from cluster.faces.http import log_probs
from cluster.faces.http.service import make_app
from tests.cluster.fakes import ScriptedCells, all_modes, generation, tokens
from tests.cluster.test_grpc import Stub, ask
from tests.cluster.test_http import TEXT, complete, events_of
from twotower.core import AnyRequest
from twotower.errors import Unavailable
from twotower.pb.twotower.v1 import generation_pb2 as pb

FIELDS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


async def test_the_shape_is_openais(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    body = (await complete(http, logprobs=2, diffusion={"mode": "ar"})).json()
    [choice] = body["choices"]
    told = choice["logprobs"]
    assert cells.requests[-1].logprobs == 2
    assert told["tokens"] == list(TEXT) and told["text_offset"] == list(range(len(TEXT)))
    assert told["token_logprobs"] == [-token / 100 for token in choice["token_ids"]]
    assert told["confidence"] is None
    for token, name, top in zip(choice["token_ids"], told["tokens"], told["top_logprobs"], strict=True):
        assert top == {name: -token / 100, "\x00": -0.04, "\x01": -0.05}, "the token itself is always among them"


@pytest.mark.parametrize("asked", [{}, {"logprobs": None}, {"logprobs": False}])
async def test_who_does_not_ask_gets_none(http: httpx.AsyncClient, cells: ScriptedCells, asked: dict[str, Any]) -> None:
    [choice] = (await complete(http, **asked)).json()["choices"]
    assert choice["logprobs"] is None and cells.requests[-1].logprobs is None


async def test_none_of_the_others_is_the_tokens_own_alone(http: httpx.AsyncClient) -> None:
    [choice] = (await complete(http, logprobs=0)).json()["choices"]
    told = choice["logprobs"]
    assert told["top_logprobs"] == [
        {name: value} for name, value in zip(told["tokens"], told["token_logprobs"], strict=True)
    ]
    assert told["confidence"] == [0.5] * len(TEXT)


@pytest.mark.parametrize("stop", [None, "come"])
async def test_a_stream_tells_the_same(http: httpx.AsyncClient, stop: str | None) -> None:
    [whole] = (await complete(http, logprobs=1, stop=stop)).json()["choices"]
    *chunks, done = events_of((await complete(http, logprobs=1, stop=stop, stream=True)).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert done == "[DONE]" and len(choices) > 3
    for choice in choices:
        assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"])
    for name in (*FIELDS, "confidence"):
        assert [one for choice in choices for one in choice["logprobs"][name]] == whole["logprobs"][name]


async def test_a_stop_string_cuts_them_with_the_tokens(http: httpx.AsyncClient) -> None:
    """As `token_ids` they end with the token that completes the string, inside of a block."""
    [choice] = (await complete(http, logprobs=1, stop="od th")).json()["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "All go" and told["tokens"] == list("All good th")
    assert all(len(told[name]) == len(choice["token_ids"]) == 11 for name in FIELDS)


async def test_each_prompt_has_its_own(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    cells.echo = True
    choices = (await complete(http, prompt=["a", "b"], max_tokens=6, logprobs=0)).json()["choices"]
    assert [choice["logprobs"]["tokens"] for choice in choices] == [["a"] * 6, ["b"] * 6]


async def test_characters_of_several_tokens(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    """A byte of a character is called by its id; its offset is that of the character."""
    cells.answer = tokens("a€b")
    [choice] = (await complete(http, logprobs=0)).json()["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "a€b"
    assert told["tokens"] == ["a", *(f"token_id:{token}" for token in tokens("€")), "b"]
    assert told["text_offset"] == [0, 1, 1, 1, 2]


async def test_a_long_answer_is_put_together_of_parts(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    [at_once] = (await complete(http, logprobs=1)).json()["choices"]
    monkeypatch.setattr(log_probs, "AT_ONCE", 5)
    [choice] = (await complete(http, logprobs=1)).json()["choices"]
    assert choice["logprobs"] == at_once["logprobs"]


async def test_without_a_tokenizer_tokens_are_called_by_their_ids(cells: ScriptedCells) -> None:
    app = make_app(generation(cells, with_tokenizer=False), all_modes)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
        [choice] = (await complete(http, prompt=[5, 6], max_tokens=2, logprobs=1)).json()["choices"]
    first, second = tokens(TEXT)[:2]
    assert choice["logprobs"]["tokens"] == [f"token_id:{first}", f"token_id:{second}"]
    assert choice["logprobs"]["top_logprobs"][0] == {f"token_id:{first}": -first / 100, "token_id:4": -0.04}
    assert choice["logprobs"]["text_offset"] == [0, 0]


@pytest.mark.parametrize("mode", ["diffusion", "verified"])
async def test_they_go_right_across_the_death_of_a_cell(
    http: httpx.AsyncClient, cells: ScriptedCells, mode: str
) -> None:
    [unhurt] = (await complete(http, logprobs=1, diffusion={"mode": mode})).json()["choices"]
    deaths = [5, 3]

    def die(request: AnyRequest, block: int) -> None:
        if deaths and block == deaths[-1]:
            deaths.pop()
            raise Unavailable("the cell is gone")

    cells.fail = die
    [choice] = (await complete(http, logprobs=1, diffusion={"mode": mode})).json()["choices"]
    assert choice["logprobs"] == unhurt["logprobs"] and len(cells.requests) == 4
    assert cells.requests[-1].logprobs == 1 and len(cells.requests[-1].committed) == 20


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(-1, "got -1"), (21, "got 21"), (1.0, "got 1.0"), (True, "got True"), ("5", "got '5'"), ([1], "got [1]")],
)
async def test_others_are_refused_by_name(http: httpx.AsyncClient, value: object, wanted: str) -> None:
    error = (await complete(http, logprobs=value)).json()["error"]
    assert error["param"] == "logprobs"
    assert error["message"] == f"logprobs: {wanted}, wanted an integer from 0 to 20"


async def test_grpc_whole_and_streamed(stub: Stub, cells: ScriptedCells) -> None:
    whole = await stub.Generate(ask(logprobs=2))
    *blocks, last = [event async for event in stub.GenerateStream(ask(logprobs=2))]
    assert [one for event in blocks for one in event.block.likelihoods] == list(whole.likelihoods)
    assert [one.log_prob for one in whole.likelihoods] == pytest.approx([-token / 100 for token in whole.token_ids])
    assert "".join(one.text for one in whole.likelihoods) == whole.text
    for one in whole.likelihoods:
        assert list(one.top_token_ids) == [4, 5] and list(one.top_texts) == ["\x00", "\x01"]
        assert list(one.top_log_probs) == pytest.approx([-0.04, -0.05]) and one.confidence == 0.5
    assert last.WhichOneof("event") == "finished"


async def test_grpc_of_zero_and_of_nobody(stub: Stub, cells: ScriptedCells) -> None:
    """0 is asked for: the field has presence."""
    mode = pb.DecodingParams(mode=pb.MODE_AR)
    asked, quiet = await stub.Generate(ask(logprobs=0, params=mode)), await stub.Generate(ask(params=mode))
    assert [request.logprobs for request in cells.requests] == [0, None]
    assert len(asked.likelihoods) == len(asked.token_ids) and not quiet.likelihoods
    assert not any(one.top_token_ids or one.HasField("confidence") for one in asked.likelihoods)
