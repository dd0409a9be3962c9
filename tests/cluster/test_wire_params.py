"""Every declared parameter goes over every face, and the .proto has the fields that the declarations ask for."""

import argparse
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor

from cluster.cli.generate_arguments import add_generate_arguments, request_of
from cluster.faces.grpc.wire_params import given_in, params_message
from cluster.faces.http.completions import parse_call
from twotower.constraints import Constraint, Constraints
from twotower.core import PARAMETERS, DecodingParams, Floor, Mode
from twotower.parameters import Choice, Flag, Integer, Number, TokenBiases, TokenIds
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.validation import check_values
from twotower_client.asking import ask_of
from twotower_client.grpc_codec import generate_rpc

# A field keeps its number for good. A new parameter takes the next.
NUMBERS = {
    "mode": 1,
    "max_new_tokens": 2,
    "block_size": 3,
    "steps_per_block": 4,
    "confidence_threshold": 5,
    "temperature": 6,
    "top_k": 7,
    "top_p": 8,
    "seed": 9,
    "stop_token_ids": 10,
    "ignore_eos": 11,
    "draft_steps": 12,
    "draft_threshold": 13,
    "floor": 40,
    "min_p": 41,
    "min_tokens": 42,
    "logit_bias": 43,
    "presence_penalty": 44,
    "frequency_penalty": 45,
    "repetition_penalty": 46,
    "structured_outputs": 47,
}
TYPES = {
    Choice: FieldDescriptor.TYPE_ENUM,
    Integer: FieldDescriptor.TYPE_INT64,
    Number: FieldDescriptor.TYPE_DOUBLE,
    TokenIds: FieldDescriptor.TYPE_UINT32,
    TokenBiases: FieldDescriptor.TYPE_MESSAGE,
    Constraints: FieldDescriptor.TYPE_MESSAGE,
    Flag: FieldDescriptor.TYPE_BOOL,
}
# A value that is no default, as a flag and as JSON.
GIVEN: dict[str, tuple[list[str], Any]] = {
    "mode": (["--mode", "mock_ar"], "mock_ar"),
    "max_new_tokens": (["--max-new-tokens", "7"], 7),
    "block_size": (["--block-size", "4"], 4),
    "steps_per_block": (["--steps-per-block", "2"], 2),
    "confidence_threshold": (["--confidence-threshold", "0"], 0),
    "temperature": (["--temperature", "0.25"], 0.25),
    "top_k": (["--top-k", "3"], 3),
    "top_p": (["--top-p", "0.5"], 0.5),
    "seed": (["--seed", "0"], 0),
    "stop_token_ids": (["--stop-token-ids", "7,8"], [7, 8]),
    "ignore_eos": (["--ignore-eos"], True),
    "draft_steps": (["--draft-steps", "3"], 3),
    "draft_threshold": (["--draft-threshold", "1"], 1),
    "floor": (["--floor", "confidence"], "confidence"),
    "min_p": (["--min-p", "0.25"], 0.25),
    "min_tokens": (["--min-tokens", "3"], 3),
    "logit_bias": (["--logit-bias", "7:-1.5,11:2"], {"7": -1.5, "11": 2}),
    "presence_penalty": (["--presence-penalty", "-2"], -2),
    "frequency_penalty": (["--frequency-penalty", "0.5"], 0.5),
    "repetition_penalty": (["--repetition-penalty", "1.5"], 1.5),
    "structured_outputs": (["--structured-outputs", '{"json": {"type": "object"}}'], {"json": {"type": "object"}}),
}


def test_the_message_is_what_is_declared() -> None:
    message = pb.DecodingParams.DESCRIPTOR
    assert {field.name: field.number for field in message.fields} == NUMBERS
    assert {field.name: field.type for field in message.fields} == {
        n: TYPES[type(p.kind)] for n, p in PARAMETERS.items()
    }
    for field in message.fields:
        kind = PARAMETERS[field.name].kind
        assert field.is_repeated == isinstance(kind, TokenIds | TokenBiases)
        if not isinstance(kind, TokenIds | TokenBiases | Choice):
            assert field.has_presence, f"{field.name}: what is not given must not look like 0"
    assert {v.name: v.number for v in pb.Mode.DESCRIPTOR.values} == {
        "MODE_UNSPECIFIED": 0,
        "MODE_DIFFUSION": 1,
        "MODE_MOCK_AR": 2,
        "MODE_AR": 3,
        "MODE_VERIFIED": 4,
        "MODE_AUTO": 5,
    }
    assert set(pb.Mode.keys()) == {"MODE_UNSPECIFIED", *(f"MODE_{mode.upper()}" for mode in Mode)}
    assert {v.name: v.number for v in pb.Floor.DESCRIPTOR.values} == {
        "FLOOR_UNSPECIFIED": 0,
        "FLOOR_LOSSLESS": 1,
        "FLOOR_CONFIDENCE": 2,
    }
    assert set(pb.Floor.keys()) == {"FLOOR_UNSPECIFIED", *(f"FLOOR_{floor.upper()}" for floor in Floor)}


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_is_given_arrives_and_nothing_else(name: str) -> None:
    flags, value = GIVEN[name]
    outer, dot, inner = PARAMETERS[name].http.partition(".")
    body = {"prompt": "a", outer: {inner: value} if dot else value}
    assert parse_call(body).asks[0].params == {name: value}

    parser = argparse.ArgumentParser()
    add_generate_arguments(parser)
    ask, _ = ask_of(*request_of(parser.parse_args(["--prompt", "a", *flags])))
    arrived = given_in(pb.GenerateRequest.FromString(generate_rpc(ask).message).params)
    assert check_values(arrived) == check_values({name: value})


def test_defaults_go_there_and_back() -> None:
    params = DecodingParams(Mode.AR, 5, top_p=0.5, stop_token_ids=(1, 2), logit_bias=((3, -1.0), (9, 2.5)))
    values = {name: getattr(params, name) for name in PARAMETERS}
    assert DecodingParams(**check_values(given_in(params_message(values)))) == params
    assert given_in(pb.DecodingParams()) == {}


@pytest.mark.parametrize(
    "described",
    [{"json_object": True}, {"regex": "[a-z]+"}, {"choice": ["a", "b c"]}, {"grammar": 'start: "a"'}, {"json": "{}"}],
)
def test_what_a_text_has_to_be_arrives_from_there(described: dict[str, Any]) -> None:
    [constraint] = check_values({"structured_outputs": described}).values()
    assert isinstance(constraint, Constraint)
    message = pb.DecodingParams.FromString(params_message({"structured_outputs": constraint}).SerializeToString())
    assert given_in(message) == {"structured_outputs": described}


def test_a_mode_of_a_newer_client_stays_a_number() -> None:
    assert given_in(pb.DecodingParams(mode=99, floor=7)) == {"mode": 99, "floor": 7}  # type: ignore[arg-type]


def test_long_lists_are_not_copied() -> None:
    message = pb.DecodingParams(stop_token_ids=[5] * 1000)
    ids = given_in(message)["stop_token_ids"]
    message.stop_token_ids.append(6)
    assert len(ids) == 1001  # type: ignore[arg-type]
