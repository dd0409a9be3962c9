"""Scoring over HTTP, by scripted cells: what is scored, what is refused, how it ends."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.cluster.fakes import ScriptedCells, tokens
from tests.cluster.test_http import raising
from twotower.errors import InvalidRequest, NumericalError, Overloaded, Unavailable

BODY: dict[str, Any] = {"prompt": "Hi", "continuation": " there"}


async def test_one_entry_for_each_token_of_the_continuation(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    response = await http.post("/v1/score", json={**BODY, "priority": -7, "request_id": "s-1"})
    answer = response.json()
    assert response.status_code == 200 and answer["id"].startswith("score-") and answer["request_id"] == "s-1"
    assert response.headers["x-request-id"] == "s-1"
    assert (answer["object"], answer["model"], answer["prompt_tokens"]) == ("score", "fake", 3)
    assert tuple(answer["token_ids"]) == tokens(" there")
    assert "".join(answer["texts"]) == " there"
    assert answer["log_probs"] == pytest.approx([-token / 100 for token in tokens(" there")])
    assert answer["is_greedy"] == [token % 2 == 0 for token in tokens(" there")]
    assert answer["sum_log_prob"] == pytest.approx(-sum(tokens(" there")) / 100)
    [scored] = cells.scored
    assert (scored.token_ids, scored.start, scored.priority) == ((1, *tokens("Hi"), *tokens(" there")), 3, -7)


async def test_token_ids_are_taken_as_they_are(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    await http.post("/v1/score", json={"prompt": [7, 8], "continuation": [2, 0], "model": "fake", "user": "me"})
    [scored] = cells.scored
    assert (scored.token_ids, scored.start) == ((7, 8, 2, 0), 2)


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"prompt": None}, "prompt", "missing, wanted a string or a list of token ids"),
        ({"continuation": None}, "continuation", "missing, wanted a string or a list of token ids"),
        ({"prompt": {"text": "a"}}, "prompt", "wanted a string or a list of token ids"),
        ({"prompt": ["Hi"]}, "prompt[0]", "wanted a token id from 0"),
        ({"continuation": ""}, "continuation", "got an empty continuation, wanted at least one token"),
        ({"continuation": [5, 260]}, "continuation[1]", "got 260, wanted a token id from 0"),
        ({"continuation": [5] * 255}, "continuation", "wanted at most 256 together"),
        ({"priority": 2**40}, "priority", "wanted an integer from -2147483648"),
        ({"continuatoin": "a"}, "continuatoin", "unknown field; did you mean continuation?"),
        ({"temperature": 1}, "temperature", "unknown field"),
        ({"request_id": "a" * 513}, "request_id", "got a string of 513 characters, wanted at most 512"),
        ({"request_id": 5}, "request_id", "got 5, wanted a string"),
    ],
)
async def test_what_is_wrong_is_named(
    http: httpx.AsyncClient, cells: ScriptedCells, changes: dict[str, Any], param: str, words: str
) -> None:
    response = await http.post("/v1/score", json={**BODY, **changes})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and words in error["message"], error
    assert cells.scored == []


async def test_another_model_is_refused(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/score", json={**BODY, "model": "other"})
    assert response.status_code == 404 and "wanted 'fake'" in response.json()["error"]["message"].replace('"', "'")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Overloaded("full"), 429),
        (Unavailable("gone"), 503),
        (NumericalError("NaN"), 500),
        (InvalidRequest.of("token_ids", "too long"), 400),  # the ledger's: more than the cell's whole cache
    ],
)
async def test_errors_have_their_codes(
    http: httpx.AsyncClient, cells: ScriptedCells, error: Exception, status: int
) -> None:
    cells.fail = raising(error, 0)
    response = await http.post("/v1/score", json=BODY)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == ("continuation" if status == 400 else None)
    assert cells.open == 0


async def test_a_deadline_frees_its_sequence(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    cells.pace_s = 5.0
    response = await http.post("/v1/score", json=BODY, headers={"x-request-timeout": "0.1"})
    assert response.status_code == 504, response.text
    async with asyncio.timeout(2):
        while cells.open:
            await asyncio.sleep(0.001)
