"""Scoring over HTTP, by scripted cells: what is scored, what is refused, how it ends."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.cluster.fakes import ByteTokenizer, ScriptedCells, tokens
from tests.cluster.test_http import raising
from twotower.core import AnyRequest
from twotower.errors import InvalidRequest, NumericalError, Overloaded, Unavailable

BODY: dict[str, Any] = {"prompt": "Hi", "continuation": " there"}
TEXTS = [" all", "!", *["?"] * 9]


def several(continuations: object) -> dict[str, Any]:
    """What makes BODY ask for these."""
    return {"continuation": None, "continuations": continuations}


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


@pytest.mark.parametrize("as_ids", [False, True])
async def test_several_continuations_are_scored_each_on_its_own(
    http: httpx.AsyncClient, cells: ScriptedCells, as_ids: bool
) -> None:
    asked = [tokens(text) for text in TEXTS] if as_ids else TEXTS
    response = await http.post("/v1/score", json={**several(asked), "prompt": "Hi", "request_id": "s-1", "priority": 3})
    answer, plain = response.json(), (await http.post("/v1/score", json={**BODY, "continuation": TEXTS[0]})).json()
    assert response.status_code == 200 and response.headers["x-request-id"] == answer["request_id"] == "s-1"
    assert (answer["object"], answer["prompt_tokens"], len(answer["scores"])) == ("scores", 3, 11)
    assert answer["scores"][0] == {name: plain[name] for name in answer["scores"][0]} and "scores" not in plain
    for one, text in zip(answer["scores"], TEXTS, strict=True):
        assert tuple(one["token_ids"]) == tokens(text) and "".join(one["texts"]) == text
        assert one["log_probs"] == pytest.approx([-token / 100 for token in tokens(text)])
        assert one["sum_log_prob"] == pytest.approx(-sum(tokens(text)) / 100) and len(one["is_greedy"]) == len(text)
    assert {(scored.start, scored.priority) for scored in cells.scored[:-1]} == {(3, 3)}
    assert len({scored.id for scored in cells.scored}) == len(cells.scored) == 12 and cells.open == 0


async def test_one_of_a_list_is_told_as_a_list(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/v1/score", json={**BODY, **several(["!"])})).json()
    assert len(answer["scores"]) == 1 and answer["object"] == "scores"


async def test_the_most_continuations(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    answer = (await http.post("/v1/score", json={**BODY, **several(["a"] * 256)})).json()
    assert len(answer["scores"]) == len(cells.scored) == 256


async def test_a_fault_of_a_cell_has_its_continuations_name(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    def fail(request: AnyRequest, block: int) -> None:
        if request.id.endswith("-1"):
            raise InvalidRequest.of("token_ids", "too long")

    cells.fail = fail
    response = await http.post("/v1/score", json={**BODY, **several(["a", "b", "c"])})
    assert response.status_code == 400 and response.json()["error"]["param"] == "continuations[1]"
    assert cells.open == 0


@pytest.mark.parametrize("asked", [["a" * 50] * 3, [[5] * 50] * 3], ids=["texts", "ids"])
async def test_tokens_of_all_continuations_have_a_bound(
    http: httpx.AsyncClient, cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch, asked: list[object]
) -> None:
    """The prompt's count with each: every continuation is read behind it."""
    body = {**BODY, **several(asked), "prompt": [5] * 10}
    monkeypatch.setattr("cluster.runs.continuations.MAX_TOKENS", 180)
    assert (await http.post("/v1/score", json=body)).status_code == 200
    cells.scored.clear()
    monkeypatch.setattr("cluster.runs.continuations.MAX_TOKENS", 179)
    error = (await http.post("/v1/score", json=body)).json()["error"]
    assert error["param"] == "continuations[2]" and "got 180 tokens up to this one" in error["message"]
    assert cells.scored == []
    one = {**BODY, "prompt": [5] * 100, "continuation": [5] * 100}
    assert (await http.post("/v1/score", json=one)).status_code == 200, "alone it has its sequence's bound"


async def test_a_text_prompt_is_tokenized_once(
    http: httpx.AsyncClient, cells: ScriptedCells, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = ByteTokenizer.encode

    def noted(self: ByteTokenizer, text: str) -> list[int]:
        encoded.append(text)
        return encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode", noted)
    await http.post("/v1/score", json={**BODY, **several(["a"] * 3)})
    assert encoded.count("Hi") == 1


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
        ({"prompt": None, "continuation": None}, "prompt", "continuation: missing, wanted a string or a list of"),
        ({"continuations": ["a"]}, "continuation", "got it beside continuations, wanted one of them"),
        (several([]), "continuations", "got [], wanted a list of 1 to 256 strings, or of as many lists of token ids"),
        (several("a"), "continuations", "wanted a list of 1 to 256 strings"),
        (several([5, 6]), "continuations", "got 5 at place 0, wanted a list of 1 to 256 strings"),
        (several(["a", [5]]), "continuations", "at place 1, wanted a list of 1 to 256 strings"),
        (several(["a"] * 257), "continuations", "got 257 continuations, wanted at most 256"),
        (several(["a", ""]), "continuations[1]", "got an empty continuation, wanted at least one token"),
        (several([[5], [6, 260]]), "continuations[1][1]", "got 260, wanted a token id from 0"),
        (several([[5], [5] * 254]), "continuations[1]", "wanted at most 256 together"),
        (several(["a", "a" * 255]), "continuations[1]", "wanted at most 256 together"),
        (several(["a", "b"]) | {"prompt": [7, 260]}, "prompt[1]", "got 260, wanted a token id from 0"),
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
