"""`echo`: the prompt again before its answer, with likelihoods of its tokens where `logprobs` asks for them."""

from typing import Any

import httpx
import pytest

from cluster.faces.http.service import make_app
from tests.cluster.fakes import ScriptedCells, all_modes, generation, tokens
from tests.cluster.test_http import TEXT, complete
from twotower.core import AnyRequest, ScoreRequest
from twotower.errors import Unavailable

AR = {"mode": "ar"}


async def _choice(http: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    response = await complete(http, echo=True, **fields)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    return dict(choice)


async def test_a_prompt_is_scored_and_its_answer_rated(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    choice = await _choice(http, logprobs=1, max_tokens=6)
    told, ids = choice["logprobs"], (1, *tokens("Hi"), *tokens(TEXT[:6]))
    assert choice["text"] == "Hi" + TEXT[:6] and tuple(choice["token_ids"]) == ids
    assert told["tokens"] == ["token_id:1", *("Hi" + TEXT[:6])]
    assert told["token_logprobs"] == [None, *(-token / 100 for token in ids[1:])]
    assert told["top_logprobs"][:2] == [None, {"H": -ids[1] / 100, "\x00": -0.04}]
    assert told["text_offset"] == [0, *range(8)]
    assert told["confidence"] == [None] * 3 + [0.5] * 6
    [scored], [request] = cells.scored, cells.requests
    assert (scored.token_ids, scored.start, scored.logprobs) == (ids[:3], 1, 1)
    assert request.prompt_token_ids == ids[:3]


async def test_max_tokens_0_scores_and_answers_nothing(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    body = (await complete(http, echo=True, max_tokens=0, logprobs=0)).json()
    [choice] = body["choices"]
    ids = (1, *tokens("Hi"))
    score = (await http.post("/v1/score", json={"prompt": [ids[0]], "continuation": list(ids[1:])})).json()
    assert choice["logprobs"]["token_logprobs"] == [None, *score["log_probs"]]
    assert choice["text"] == "Hi" and choice["finish_reason"] == "length" and cells.requests == []
    assert choice["logprobs"]["confidence"] is None
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 0, 3)


async def test_as_lm_eval_asks_and_reads(http: httpx.AsyncClient) -> None:
    """Its local-completions sends contexts and continuations as one list of ids, and drops the token generated."""
    prompts = [[1, *tokens("one two")], [1, *tokens("three")]]
    asked = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    out = (await complete(http, prompt=prompts, **asked)).json()
    for choice, ids, context in zip(out["choices"], prompts, (4, 2), strict=True):
        told = choice["logprobs"]
        assert sum(told["token_logprobs"][context:-1]) == pytest.approx(sum(-token / 100 for token in ids[context:]))
        for log_prob, top in zip(told["token_logprobs"][context:-1], told["top_logprobs"][context:-1], strict=True):
            assert max(top.values()) == -0.04 and log_prob in top.values()


async def test_without_logprobs_it_is_the_text_alone(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    choice = await _choice(http, max_tokens=6)
    assert choice["text"] == "Hi" + TEXT[:6] and choice["logprobs"] is None and cells.scored == []
    nothing = await _choice(http, max_tokens=0, prompt=[5 + 60, 6 + 60])
    assert nothing["text"] == "=>" and nothing["token_ids"] == [65, 66] and len(cells.requests) == 1


async def test_one_token_follows_nothing(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    choice = await _choice(http, prompt=[65], max_tokens=2, logprobs=1)
    assert choice["logprobs"]["token_logprobs"] == [None, *(-token / 100 for token in tokens(TEXT[:2]))]
    assert cells.scored == []


async def test_a_stop_string_is_not_looked_for_in_the_prompt(http: httpx.AsyncClient) -> None:
    choice = await _choice(http, prompt="so good", logprobs=0, stop="good")
    assert choice["text"] == "so goodAll " and choice["logprobs"]["tokens"][-8:] == list("All good")


async def test_it_goes_on_where_a_cell_dies(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    unhurt = await _choice(http, logprobs=1, diffusion=AR)
    deaths = [True, True]

    def die(request: AnyRequest, block: int) -> None:
        if isinstance(request, ScoreRequest) == (len(deaths) == 2) and block in (0, 3) and deaths:
            deaths.pop()
            raise Unavailable("the cell is gone")

    cells.fail = die
    hurt = await _choice(http, logprobs=1, diffusion=AR)
    assert hurt["logprobs"] == unhurt["logprobs"] and not deaths
    assert len(cells.scored) == 3 and cells.open == 0


async def test_without_a_tokenizer(cells: ScriptedCells) -> None:
    transport = httpx.ASGITransport(make_app(generation(cells, with_tokenizer=False), all_modes))
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
        choice = await _choice(http, prompt=[5, 6], max_tokens=0, logprobs=0)
    assert choice["logprobs"]["tokens"] == ["token_id:5", "token_id:6"] and choice["text"] == ""
    assert choice["logprobs"]["top_logprobs"] == [None, {"token_id:6": -0.06}]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"stream": True}, "echo", "got true, wanted it only without stream"),
        ({"max_tokens": -1}, "max_tokens", "got -1, wanted an integer from 1"),
        ({"max_tokens": False}, "max_tokens", "got False, wanted an integer from 1"),
        ({"max_tokens": 0.0}, "max_tokens", "got 0.0, wanted an integer from 1"),
        ({"max_tokens": 0, "prompt": [5] * 256}, "prompt", "got 256 tokens, wanted at most 255"),
        ({"max_tokens": 0, "prompt": []}, "prompt", "got an empty prompt"),
        ({"logprobs": 21}, "logprobs", "got 21, wanted an integer from 0 to 20"),
    ],
)
async def test_refusals(
    http: httpx.AsyncClient, cells: ScriptedCells, fields: dict[str, object], param: str, words: str
) -> None:
    error = (await complete(http, echo=True, **fields)).json()["error"]
    assert error["param"] == param and words in error["message"]
    assert not cells.requests and not cells.scored


async def test_many_prompts_take_turns(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    """Of a call the cells hold 16 at a time, scores and answers together."""
    most = 0

    def count(request: AnyRequest, block: int) -> None:
        nonlocal most
        most = max(most, cells.open)

    cells.fail, cells.pace_s = count, 0.001
    prompts = [[5 + place, 6, 7] for place in range(40)]
    choices = (await complete(http, prompt=prompts, max_tokens=2, logprobs=0, echo=True)).json()["choices"]
    assert [choice["token_ids"][0] for choice in choices] == [5 + place for place in range(40)]
    assert most == 16 and cells.open == 0
