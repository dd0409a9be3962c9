"""One line for each request: its numbers, and none of its text."""

import json
import logging
from typing import Any

import httpx
import pytest

from cluster.faces.http.service import make_app
from cluster.runs.generation import Generation
from cluster.runs.run import Patience
from cluster.watch.request_log import RequestLog
from tests.cluster.fakes import FINGERPRINT, ByteTokenizer, ScriptedCells, generation, served_model, tokens
from tests.cluster.runs.script import GONE, WELL, Script, Stay
from twotower.core import AnyRequest
from twotower.errors import InvalidRequest, NumericalError, Unavailable

SECRET = "the heron's password is Ölberg42"
ANSWER = "never tell the heron"


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    messages = [record.getMessage() for record in caplog.records if record.name == "cluster.watch.request_log"]
    return [json.loads(message.removeprefix("request ")) for message in messages if message.startswith("request ")]


async def posted(service: Generation, body: dict[str, Any], label: str = "gateway-7") -> httpx.Response:
    transport = httpx.ASGITransport(make_app(service, lambda: True))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
        return await http.post("/v1/completions", json=body, headers={"x-request-id": label})


def over(script: Script) -> Generation:
    return Generation(served_model(ByteTokenizer()), script, patience=Patience(3, 0.05), observers=(RequestLog(),))


def none_of_the_text(caplog: pytest.LogCaptureFixture) -> bool:
    """Nor of its tokens, in whatever form."""
    told = caplog.text + "".join(str(record.args) for record in caplog.records)
    words = [word for text in (SECRET, ANSWER, "unstoppable") for word in text.split() if len(word) > 3]
    token_ids = [str(list(tokens(text)))[1:12] for text in (SECRET, ANSWER)]
    return not any(part in told for part in (*words, *token_ids))


async def test_a_line_says_what_a_request_has_cost(caplog: pytest.LogCaptureFixture) -> None:
    answer = tokens(ANSWER)
    script = Script(answer, [Stay(2, GONE, cell="a"), Stay(cell="b")])
    with caplog.at_level(logging.DEBUG):
        body = {"prompt": SECRET, "stop": ["unstoppable"], "max_tokens": 64, "priority": -1}
        response = await posted(over(script), body)
    assert response.status_code == 200 and response.json()["choices"][0]["text"] == ANSWER
    [line] = lines(caplog)
    times = {name: line.pop(name) for name in ("queue_s", "first_token_s", "seconds")}
    assert 0 <= times["queue_s"] <= times["first_token_s"] <= times["seconds"] < 60
    assert line.pop("id") not in ("", "gateway-7")
    assert line == {
        "label": "gateway-7",
        "mode": "diffusion",
        "prompt_tokens": 1 + len(tokens(SECRET)),
        "max_new_tokens": 64,
        "temperature": 0.0,
        "priority": -1,
        "outcome": "length",
        "cell": "b",
        "cells": 2,
        "tokens": len(answer),
        "blocks": 5,
        "steps": 10,
        "resumes": 1,
    }
    assert none_of_the_text(caplog)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (NumericalError("NaN in block 3"), "ABORTED"),
        (Unavailable("the cell is gone"), "UNAVAILABLE"),
        (InvalidRequest.of("prompt", f"got {SECRET!r}"), "INVALID_ARGUMENT"),
        (RuntimeError(f"while reading {SECRET}"), "INTERNAL"),
    ],
)
async def test_errors_bring_no_text_either(error: Exception, outcome: str, caplog: pytest.LogCaptureFixture) -> None:
    """What our own errors say is told, but for those that show what was given."""
    cells = ScriptedCells(ANSWER)

    def fail(request: AnyRequest, block: int) -> None:
        if block:
            raise error

    cells.fail = fail
    service = Generation(served_model(ByteTokenizer()), cells, patience=Patience(0, 0.05), observers=(RequestLog(),))
    with caplog.at_level(logging.INFO, "cluster.watch"):
        await posted(service, {"prompt": SECRET})
    [line] = lines(caplog)
    assert line["outcome"] == outcome and line["tokens"] == 4
    shows = isinstance(error, NumericalError | Unavailable)
    assert line["why"] == (str(error) if shows else type(error).__name__)
    if outcome != "INTERNAL":  # which the face logs with its traceback, for whoever mends it
        assert none_of_the_text(caplog)


async def test_each_prompt_of_a_call_and_a_label_that_needs_quotes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cluster.watch"):
        await posted(over(Script(tokens(ANSWER), [WELL])), {"prompt": [SECRET, SECRET]}, 'a"b\\c=d')
    found = lines(caplog)
    assert len(found) == 2 == len({line["id"] for line in found})
    assert {line["label"] for line in found} == {'a"b\\c=d'} and FINGERPRINT not in caplog.text


async def test_one_that_no_cell_took(caplog: pytest.LogCaptureFixture) -> None:
    service = over(Script((), [Stay(refuses=Unavailable("this cell is mending"))]))
    with caplog.at_level(logging.WARNING, "cluster.watch"):
        await posted(service, {"prompt": SECRET})
    [line] = lines(caplog)
    assert (line["outcome"], line["cells"], line["tokens"]) == ("UNAVAILABLE", 0, 0)
    assert "cell" not in line and "queue_s" not in line and "this cell is mending" in line["why"]


async def test_no_line_for_what_was_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cluster.watch"):
        response = await posted(generation(ScriptedCells(), observers=(RequestLog(),)), {"prompt": SECRET * 100})
    assert response.status_code == 400 and not lines(caplog)
