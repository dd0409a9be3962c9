"""What an answer has to be, on the command line: judged before any tower is loaded."""

import json

import pytest

from twotower.commands.arguments import parse
from twotower.commands.orders import open_model, order_of
from twotower.commands.parameter_flags import given_parameters
from twotower.errors import InvalidRequest


def _flag(described: object) -> dict[str, object]:
    text = described if isinstance(described, str) else json.dumps(described)
    flags = ["--mode", "ar", "--prompt", "a", "--structured-outputs", text]
    return {"prompt": "a", **given_parameters(parse(["generate", "--checkpoint", "demo", *flags]))}


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"regex": "(a"}, "structured_outputs: regex: .*unclosed group"),
        ("[a-z]+", "structured_outputs: got '\\[a-z\\]\\+', wanted an object with one of json, "),
        ({"json": {"type": "objec"}}, "structured_outputs: json: Invalid type: objec"),
    ],
)
def test_a_bad_description_is_told_before_towers_are_loaded(described: object, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        order_of(_flag(described), open_model("demo", 256))


def test_a_good_one_arrives() -> None:
    order = order_of(_flag({"choice": ["a", "b"]}), open_model("demo", 256))
    assert order.request.params.structured_outputs == ("choice", '["a", "b"]')
