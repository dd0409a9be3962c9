"""`n` and `best_of`: several answers to one prompt, over completions and chats."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest

from cluster.faces.http.service import make_app
from cluster.runs.admission import Admission
from cluster.runs.choices import derived_seed, log_prob_per_token
from cluster.runs.generation import Generation
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, all_modes, generation, served_model, tokens
from tests.cluster.test_http import complete, events_of
from twotower.core import Likelihood, Request


class SeededCells(ScriptedCells):
    """The answer of a request is its seed's place among `seeds`, again and again, and as likely as `log_probs` say."""

    def __init__(self, seeds: Sequence[int], log_probs: Sequence[float] = ()) -> None:
        super().__init__()
        self._places = {seed: place for place, seed in enumerate(seeds)}
        self._log_probs = log_probs

    async def _events(self, request: Request) -> Any:
        place = self._places[request.params.seed]
        self.answer = tokens(str(place) * 8)
        async for event in super()._events(request):
            if request.logprobs is not None and self._log_probs:
                likelihoods = tuple(Likelihood(self._log_probs[place]) for _ in event.token_ids)  # type: ignore[union-attr]
                event = replace(event, likelihoods=likelihoods)  # type: ignore[call-arg]
            yield event


def seeds(seed: int, count: int) -> list[int]:
    return [derived_seed(seed, place) for place in range(count)]


def test_the_seeds_are_as_documented() -> None:
    """docs/api.md tells how to make them."""
    assert seeds(7, 3) == [7, 7452896479269900, 969139688043390]
    assert all(0 <= seed < 2**53 for seed in seeds(2**63 - 1, 256)[1:]) and len(set(seeds(7, 256))) == 256


async def http_of(cells: ScriptedCells) -> httpx.AsyncClient:
    app = make_app(generation(cells), all_modes)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fake")


async def test_choices_come_in_the_order_of_their_seeds() -> None:
    cells = SeededCells(seeds(7, 3))
    async with await http_of(cells) as http:
        body = (await complete(http, n=3, seed=7, max_tokens=8)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["text"] for choice in body["choices"]] == ["0" * 8, "1" * 8, "2" * 8]
    assert [choice["seed"] for choice in body["choices"]] == seeds(7, 3)
    assert body["usage"]["prompt_tokens"] == 3 and body["usage"]["completion_tokens"] == 24
    assert sorted(request.id for request in cells.requests) == [f"{body['id']}-{place}" for place in range(3)]


async def test_a_choice_is_had_again_with_its_own_seed(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    told = (await complete(http, n=2, max_tokens=1)).json()["choices"]
    await complete(http, seed=told[1]["seed"], max_tokens=1)
    assert cells.requests[1].params == cells.requests[2].params
    assert told[1]["seed"] == derived_seed(told[0]["seed"], 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_two_choices_of_each_of_two_prompts(http: httpx.AsyncClient, cells: ScriptedCells, stream: bool) -> None:
    cells.echo = True
    options = {"stream_options": {"include_usage": True}} if stream else {}
    text = (await complete(http, prompt=["a", "bb"], n=2, max_tokens=4, stream=stream, seed=1, **options)).text
    events = events_of(text)[:-1] if stream else [httpx.Response(200, text=text).json()]
    choices = [choice for event in events for choice in event["choices"]]
    texts = {c["index"]: "".join(o["text"] for o in choices if o["index"] == c["index"]) for c in choices}
    assert texts == {0: "aaaa", 1: "aaaa", 2: "bbbb", 3: "bbbb"}
    assert {c["index"]: c["seed"] for c in choices} == dict(enumerate(seeds(1, 2) * 2))
    usage = events[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2 + 3, 16)


async def test_the_likeliest_of_several_are_told_the_likeliest_first() -> None:
    cells = SeededCells(seeds(7, 4), (-0.5, -0.1, -0.9, -0.3))
    async with await http_of(cells) as http:
        body = (await complete(http, n=2, best_of=4, seed=7, max_tokens=8)).json()
        chat = {"messages": [{"role": "user", "content": "Hi"}], "n": 1, "best_of": 4, "seed": 7, "max_tokens": 8}
        best = (await http.post("/v1/chat/completions", json=chat)).json()["choices"]
    assert [(c["index"], c["text"], c["logprobs"]) for c in body["choices"]] == [
        (0, "1" * 8, None),
        (1, "3" * 8, None),
    ]
    assert [choice["seed"] for choice in body["choices"]] == [seeds(7, 4)[1], seeds(7, 4)[3]]
    assert body["usage"]["completion_tokens"] == 32, "those that are not told have cost as much"
    assert [choice["message"]["content"] for choice in best] == ["1" * 8]
    assert {request.logprobs for request in cells.requests} == {0}


async def test_they_are_ranked_by_what_is_asked_for_too() -> None:
    cells = SeededCells(seeds(7, 2), (-0.5, -0.1))
    async with await http_of(cells) as http:
        [choice] = (await complete(http, best_of=2, seed=7, max_tokens=8, logprobs=0)).json()["choices"]
    assert choice["text"] == "1" * 8 and choice["logprobs"]["token_logprobs"] == [-0.1] * 8


async def test_without_a_ranking_nothing_is_rated(http: httpx.AsyncClient, cells: ScriptedCells) -> None:
    assert (await complete(http, n=2, best_of=2, max_tokens=1)).status_code == 200
    assert {request.logprobs for request in cells.requests} == {None}


def test_the_mean_is_ranked() -> None:
    assert log_prob_per_token([-1.0, -3.0]) == -2.0 > log_prob_per_token([-2.5]) > log_prob_per_token([])


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"n": 0}, "n", "from 1 to 256"),
        ({"best_of": 257}, "best_of", "from 1 to 256"),
        ({"n": 3, "best_of": 2}, "best_of", "wanted at least n, which is 3"),
        ({"best_of": 2, "stream": True}, "best_of", "wanted n, which is 1, of a stream"),
        ({"prompt": ["a"] * 2, "n": 129}, "n", "which is 258; wanted at most 256 answers of a call"),
        ({"prompt": ["a"] * 3, "best_of": 86}, "best_of", "which is 258; wanted at most 256 answers of a call"),
        ({"n": 2, "echo": True}, "echo", "only where n and best_of are 1"),
        ({"best_of": 256, "max_tokens": 1025}, "best_of", "which is 262400 log-probabilities"),
    ],
)
async def test_what_is_wrong_is_told_by_name(
    http: httpx.AsyncClient, cells: ScriptedCells, fields: dict[str, Any], param: str, words: str
) -> None:
    refused = await complete(http, **fields)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == param and words in error["message"], error
    assert cells.requests == []


async def test_as_many_as_may_be(cells: ScriptedCells) -> None:
    """The cells hold 16 prompts of a call at a time, or answers to one."""
    most = 0

    def count(request: Request, block: int) -> None:
        nonlocal most
        most = max(most, cells.open)

    cells.fail = count
    async with await http_of(cells) as http:
        for fields in ({"n": 256}, {"prompt": ["a", "b"], "best_of": 128}):
            response = await complete(http, max_tokens=4, **fields)
            assert response.status_code == 200
    assert most == 16 and len(cells.requests) == 512 and cells.open == 0


async def test_each_answer_takes_room(cells: ScriptedCells) -> None:
    admission = Admission(capacity=4, slots=4)
    service = Generation(served_model(ByteTokenizer()), cells, at_once=8, admission=admission)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(make_app(service, all_modes)), base_url="http://fake"
    ) as http:
        assert (await complete(http, n=4, max_tokens=1)).status_code == 200
        assert (await complete(http, n=5, max_tokens=1)).status_code == 429
    assert admission.running == 0
