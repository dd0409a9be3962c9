"""Requests that schemathesis makes from /openapi.json, right and wrong ones: what the description says comes back, and
the next request is answered."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core import NotSet

from cluster.faces.http.description import OPERATIONS, openapi
from cluster.faces.http.service import make_app
from cluster.runs.generation import Generation
from tests.cluster.fakes import ScriptedCells, all_modes, generation
from tests.cluster.test_http import TEXT, events_of

pytestmark = pytest.mark.slow

CASES, MANY, PARTS = 200, 10_000, 5
DESCRIBED: dict[str, Any] = json.loads(openapi())
# Of each operation that takes a body: one that is answered.
PLAIN: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/score": {"prompt": "Hi", "continuation": "there"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [5, 6]},
}


@dataclass(frozen=True)
class Asked:
    """`path` is the description's. It is shown so that a failure can be repeated."""

    method: str
    path: str
    url: str
    body: bytes | None


@cache
def made(path: str, method: str, mode: GenerationMode) -> st.SearchStrategy[schemathesis.Case]:
    """To make one takes a second."""
    operation: Any = schema()[path][method.upper()]
    strategy: st.SearchStrategy[schemathesis.Case] = operation.as_strategy(generation_mode=mode)
    return strategy


@cache
def schema() -> Any:
    return schemathesis.openapi.from_dict(DESCRIBED)


@st.composite
def cases(draw: st.DrawFn) -> Asked:
    """Of an operation that takes a body four times as often as of another. Most bodies are a plain one with a few of
    the fields that were made: with all of them nearly every request would contradict itself."""
    operation = draw(st.sampled_from([one for one in OPERATIONS for _ in range(1 if one.body is None else 4)]))
    if operation.body is None:
        case = draw(made(operation.path, operation.method, GenerationMode.POSITIVE))
        return Asked(operation.method, operation.path, case.formatted_path, None)
    case = draw(made(operation.path, operation.method, draw(st.sampled_from(list(GenerationMode)))))
    body, most = case.body, draw(st.sampled_from((0, 1, 2, 3, None)))
    if isinstance(body, dict) and most is not None:
        names = draw(st.permutations(sorted(body)))[:most]
        body = PLAIN[operation.path] | {name: body[name] for name in names}
    return Asked(operation.method, operation.path, operation.path, written(body))


def written(body: Any) -> bytes | None:
    if isinstance(body, NotSet):
        return None
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def fuzzed(number: int) -> Any:
    """The same cases each time where they are few."""
    few = number == CASES
    return settings(
        max_examples=number, deadline=None, derandomize=few, database=None, suppress_health_check=list(HealthCheck)
    )


@fuzzed(CASES)
@given(case=cases())
async def test_some(
    http: httpx.AsyncClient, service: Generation, cells: ScriptedCells, caplog: pytest.LogCaptureFixture, case: Asked
) -> None:
    await is_answered_well(http, service, cells, caplog, case)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
@fuzzed(MANY // PARTS)
@given(case=cases())
async def test_many(
    http: httpx.AsyncClient,
    service: Generation,
    cells: ScriptedCells,
    caplog: pytest.LogCaptureFixture,
    case: Asked,
    part: int,
) -> None:
    """In parts, each with cases of its own."""
    await is_answered_well(http, service, cells, caplog, case)


async def is_answered_well(
    http: httpx.AsyncClient, service: Generation, cells: ScriptedCells, caplog: pytest.LogCaptureFixture, case: Asked
) -> None:
    cells.requests.clear()
    response = await asked(http, case)
    is_right = response.status_code == 200
    assert is_right or 400 <= response.status_code < 500, (response.status_code, response.text)
    told = DESCRIBED["paths"][case.path][case.method]["responses"]["200" if is_right else "default"]
    is_as_described(told["content"], response)
    assert is_right or cells.requests == []
    assert (cells.open, service.admission.running) == (0, 0)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    plain = await http.post("/v1/completions", json=PLAIN["/v1/completions"])
    assert plain.json()["choices"][0]["text"] == TEXT


async def asked(http: httpx.AsyncClient, case: Asked) -> httpx.Response:
    async with asyncio.timeout(30):
        headers = {"content-type": "application/json"}
        return await http.request(case.method.upper(), case.url, content=case.body, headers=headers)


def is_as_described(content: Any, response: httpx.Response) -> None:
    kind = response.headers["content-type"].partition(";")[0]
    if kind == "application/json":
        bodies = [response.json()]
    else:
        *bodies, done = events_of(response.text.replace("event: twotower.trace\n", ""))
        assert done == "[DONE]"
    checker = jsonschema.Draft202012Validator({**content[kind]["schema"], "components": DESCRIBED["components"]})
    for body in bodies:
        checker.validate(body)


def test_the_cases_are_of_all_kinds() -> None:
    """Or nothing would be tested: each operation with a body answers some, and refuses some. (Of the others there is
    hardly a second case, so that some may not be drawn; tests/cluster/test_http.py asks each.)"""
    seen = Counter[tuple[str, bool]]()
    transport = httpx.ASGITransport(make_app(generation(ScriptedCells()), all_modes))
    client = httpx.AsyncClient(transport=transport, base_url="http://fake")
    with asyncio.Runner() as runner, closing(client, runner) as http:

        @fuzzed(CASES)
        @given(case=cases())
        def note(case: Asked) -> None:
            seen[case.path, runner.run(asked(http, case)).status_code == 200] += 1

        note()
    wanted = {(one.path, answered) for one in OPERATIONS for answered in (True, False) if one.body is not None}
    assert wanted <= seen.keys(), wanted - seen.keys()


@contextmanager
def closing(client: httpx.AsyncClient, runner: asyncio.Runner) -> Iterator[httpx.AsyncClient]:
    yield client
    runner.run(client.aclose())
