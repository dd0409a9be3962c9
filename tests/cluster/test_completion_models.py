"""The bodies of /v1/completions: a schema derived from what is declared, values handed on as they came."""

import jsonschema
import pytest

from cluster.faces.http import strict_body
from cluster.faces.http.completion_models import CompletionAndUsage, CompletionRequest
from cluster.faces.http.completions import parse_call
from twotower.core import PARAMETERS, PRIORITY, STOP, TRACE
from twotower.errors import InvalidRequest


def test_the_schema_has_every_parameter_as_it_is_declared() -> None:
    schema = CompletionRequest.model_json_schema()
    fields = {"": schema["properties"], "diffusion": schema["$defs"]["Diffusion"]["properties"]}
    for parameter in (*PARAMETERS.values(), STOP, PRIORITY, TRACE):
        outer, _, own = parameter.http.rpartition(".")
        told = fields[outer][own]
        assert parameter.kind.schema.items() <= told.items() and told["description"] == parameter.meaning
    assert schema["additionalProperties"] is False and schema["required"] == ["prompt"]


@pytest.mark.parametrize(
    ("body", "valid"),
    [
        ({"prompt": "a"}, True),
        ({"prompt": [5, 6], "max_tokens": 1, "diffusion": {"mode": "ar"}, "stop": ["x"], "stream": True}, True),
        ({"prompt": ["a"] * 257}, False),
        ({"prompt": "a", "max_new_tokens": 5}, False),
        ({"prompt": "a", "diffusion": {"blocksize": 5}}, False),
        ({"prompt": "a", "stream_options": {"include_usage": 1}}, False),
        ({"prompt": "a", "user": "x" * 513}, False),
        ({}, False),
    ],
)
def test_the_schema_takes_what_is_taken(body: dict[str, object], valid: bool) -> None:
    assert jsonschema.Draft202012Validator(CompletionRequest.model_json_schema()).is_valid(body) == valid
    try:
        parse_call(body)
    except InvalidRequest:
        assert not valid
    else:
        assert valid


def test_long_lists_are_handed_on_as_they_came() -> None:
    """A copy of millions of ids would hold up the router's loop, before anybody has counted them."""
    ids, stop_ids, stop = [5] * 10, [6] * 10, ["x"] * 10
    ask = parse_call({"prompt": ids, "stop_token_ids": stop_ids, "stop": stop}).asks[0]
    assert ask.prompt is ids and ask.params["stop_token_ids"] is stop_ids and ask.stop is stop
    many = [[5], [6]]
    assert [ask.prompt for ask in parse_call({"prompt": many}).asks] == many


def test_only_the_first_unknown_names_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []
    monkeypatch.setattr(strict_body.difflib, "get_close_matches", lambda name, *_, **__: looked_up.append(name) or [])
    body = {"prompt": "a"} | {f"name{i:03}": 1 for i in range(500)}
    with pytest.raises(InvalidRequest) as caught:
        parse_call(body)
    assert [problem.field for problem in caught.value.problems] == [f"name{i:03}" for i in range(8)]
    assert looked_up == [f"name{i:03}" for i in range(8)]


def test_null_is_not_given_in_every_object() -> None:
    none = dict.fromkeys(["model", "diffusion", "stream_options", "nobody_s"])
    call = parse_call({"prompt": "a", **none})
    assert call.model is None and not call.asks[0].params
    inner = {"diffusion": {"mode": None, "x": None}, "stream_options": {"include_usage": None, "x": None}}
    assert not parse_call({"prompt": "a", **inner}).asks[0].params


def test_a_response_has_all_its_fields() -> None:
    assert CompletionAndUsage.model_json_schema(mode="serialization")["properties"].keys() == {
        *("id", "request_id", "object", "created", "model", "choices", "usage")
    }
