"""Bad requests: each refused in words that name the field, what was got and what was wanted."""

import math
import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.core import MAX_COUNT, MAX_SEED, MAX_STOP_CHARACTERS, DecodingParams, Floor, Mode
from twotower.errors import InvalidRequest
from twotower.parameters import check_text
from twotower.validation import (
    ModelLimits,
    check_part,
    make_request,
    make_score_request,
    parse_params,
    parse_stop,
)

LIMITS = ModelLimits(vocab_size=128, max_sequence_length=256)
AR_ONLY = ModelLimits(vocab_size=128, max_sequence_length=256, modes=(Mode.AR,), defaults=DecodingParams(mode=Mode.AR))
NAMES = [field.name for field in fields(DecodingParams)]
DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]


def _refused(values: dict[str, Any], limits: ModelLimits = LIMITS, prompt: Any = (5, 6)) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        make_request("r", prompt, values, limits)
    assert "\n" not in str(caught.value)
    return {problem.field: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("name", "value", "got", "wanted"),
    [
        ("confidence_threshold", 1.5, "1.5", "a number in [0, 1]"),
        ("confidence_threshold", -0.1, "-0.1", "a number in [0, 1]"),
        ("confidence_threshold", math.nan, "nan", "a number in [0, 1]"),
        ("confidence_threshold", "0.5", "'0.5'", "a number in [0, 1]"),
        ("confidence_threshold", True, "True", "a number in [0, 1]"),
        ("confidence_threshold", None, "None", "a number in [0, 1]"),
        ("temperature", -1, "-1", "a number in [0, 1000]"),
        ("temperature", math.inf, "inf", "a number in [0, 1000]"),
        ("temperature", -math.inf, "-inf", "a number in [0, 1000]"),
        ("temperature", math.nan, "nan", "a number in [0, 1000]"),
        ("temperature", 10**400, "1000000000", "a number in [0, 1000]"),
        ("temperature", [0.5], "[0.5]", "a number in [0, 1000]"),
        ("top_p", 0, "0", "a number in (0, 1]"),
        ("top_p", 1.01, "1.01", "a number in (0, 1]"),
        ("top_k", -1, "-1", f"an integer from 0 to {MAX_COUNT}"),
        ("top_k", 2.0, "2.0", f"an integer from 0 to {MAX_COUNT}"),
        ("block_size", 0, "0", "an integer from 1 to 1024"),
        ("block_size", 1025, "1025", "an integer from 1 to 1024"),
        ("block_size", "16", "'16'", "an integer from 1 to 1024"),
        ("steps_per_block", 0, "0", "an integer from 1 to 1024"),
        ("steps_per_block", -3, "-3", "an integer from 1 to 1024"),
        ("steps_per_block", 2**70, str(2**70), "an integer from 1 to 1024"),
        ("max_new_tokens", 0, "0", f"an integer from 1 to {MAX_COUNT}"),
        ("max_new_tokens", False, "False", f"an integer from 1 to {MAX_COUNT}"),
        ("max_new_tokens", 7.5, "7.5", f"an integer from 1 to {MAX_COUNT}"),
        ("max_new_tokens", {}, "{}", f"an integer from 1 to {MAX_COUNT}"),
        ("seed", -1, "-1", f"an integer from 0 to {MAX_SEED}"),
        ("seed", 2**63, str(2**63), f"an integer from 0 to {MAX_SEED}"),
        ("ignore_eos", 1, "1", "true or false"),
        ("ignore_eos", "yes", "'yes'", "true or false"),
        ("stop_token_ids", 5, "5", "a list of token ids"),
        ("stop_token_ids", "5", "'5'", "a list of token ids"),
        ("mode", "diffuse", "'diffuse'", "one of diffusion, mock_ar, ar, verified, auto"),
        ("mode", "AR", "'AR'", "one of diffusion, mock_ar, ar, verified, auto"),
        ("mode", [], "[]", "one of diffusion, mock_ar, ar, verified, auto"),
        ("mode", None, "None", "one of diffusion, mock_ar, ar, verified, auto"),
        ("mode", "x" * 500, "'xxx", "one of diffusion, mock_ar, ar, verified, auto"),
        ("mode", "a\nb", r"'a\nb'", "one of diffusion, mock_ar, ar, verified, auto"),
    ],
)
def test_one_wrong_value(name: str, value: object, got: str, wanted: str) -> None:
    problems = _refused({name: value})
    assert problems.keys() == {name}
    assert re.fullmatch(rf"got .*{re.escape(got)}.*, wanted {re.escape(wanted)}", problems[name]), problems
    assert len(problems[name]) < 200


def test_values_too_large_to_write() -> None:
    assert _refused({"temperature": 10**5000})["temperature"].startswith("got a very large int, wanted a number")
    assert _refused({"mode": DEEP})["mode"].startswith("got [[[[")
    assert "a very large int" in _refused({}, prompt=[5, 10**5000])["prompt_token_ids[1]"]


@pytest.mark.parametrize("bad", [-1, 128, 10**30, 1.0, True, "5", None])
@pytest.mark.parametrize("name", ["prompt_token_ids", "stop_token_ids"])
def test_token_ids_out_of_range(name: str, bad: object) -> None:
    ids = [5, 0, 127, bad, 7]
    problems = _refused({}, prompt=ids) if name == "prompt_token_ids" else _refused({name: ids})
    assert problems == {f"{name}[3]": f"got {bad!r}, wanted a token id from 0 to 127"}


@pytest.mark.parametrize("prompt", [[], ()])
def test_empty_prompt(prompt: Any) -> None:
    assert _refused({}, prompt=prompt) == {"prompt": "got an empty prompt, wanted at least one token"}


@pytest.mark.parametrize("prompt", ["hello", b"hello", 5, None, {"a": 1}, 1.5])
def test_prompts_of_wrong_type(prompt: Any) -> None:
    assert _refused({}, prompt=prompt) == {"prompt_token_ids": f"got {prompt!r}, wanted a list of token ids"}


def test_unknown_fields() -> None:
    problems = _refused({"max_tokens": 5, "Mode": "ar", "a\nb": 1})
    assert problems.keys() == {"max_tokens", "Mode", r"'a\nb'"}
    for message in problems.values():
        assert message.startswith("unknown field, wanted one of ") and all(name in message for name in NAMES)


def test_everything_wrong_is_told_at_once() -> None:
    problems = _refused({"mode": 1, "seed": -1, "what": 0}, prompt=[])
    assert problems.keys() == {"mode", "seed", "what", "prompt"}


@pytest.mark.parametrize("bad", [True, None, "1", 1.0, [], 2**31, -(2**31) - 1, 10**30])
def test_a_wrong_priority(bad: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_request("r", [], {"seed": -1}, LIMITS, priority=bad)
    problems = {problem.field: problem.message for problem in caught.value.problems}
    assert problems.keys() == {"prompt", "seed", "priority"}
    assert problems["priority"].endswith(", wanted an integer from -2147483648 to 2147483647")


@pytest.mark.parametrize("priority", [-(2**31), -1, 0, 2**31 - 1])
def test_a_priority_is_the_requests_and_not_its_parameters(priority: int) -> None:
    assert make_request("r", [5], {}, LIMITS, priority).priority == priority
    assert _refused({"priority": priority})["priority"].startswith("unknown field")


def test_too_long() -> None:
    message = _refused({"max_new_tokens": 156}, prompt=[5] * 101)["max_new_tokens"]
    assert all(number in message for number in ("101", "156", "257", "256")), message
    for mode in Mode:
        longest = make_request("r", [5] * 101, {"mode": mode, "max_new_tokens": 155}, LIMITS)
        assert longest.positions <= 256


@pytest.mark.parametrize("mode", ["diffusion", "mock_ar"])
def test_modes_the_checkpoint_cannot_do(mode: str) -> None:
    message = _refused({"mode": mode}, AR_ONLY)["mode"]
    assert mode in message and message.endswith("wanted a mode this checkpoint can serve (ar)")


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"min_tokens": 1}, "min_tokens"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"frequency_penalty": -0.1}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"mode": "ar", "block_size": 16}, "block_size"),
        ({"mode": "mock_ar", "steps_per_block": 16}, "steps_per_block"),
        ({"mode": "ar", "confidence_threshold": 0.8}, "confidence_threshold"),
        ({"mode": "verified", "floor": "lossless"}, "floor"),
    ],
)
def test_values_without_a_meaning_in_the_mode(values: dict[str, Any], name: str) -> None:
    assert re.search(f"but {name} (is not supported|has no meaning) in", _refused(values)[name])


@pytest.mark.parametrize(
    ("floor", "values"),
    [
        ("lossless", {"confidence_threshold": 0.8}),
        ("lossless", {"steps_per_block": 4}),
        ("confidence", {"min_tokens": 5}),
        ("confidence", {"logit_bias": {"5": 1}}),
        ("confidence", {"presence_penalty": 0.5}),
        ("confidence", {"frequency_penalty": 0.5}),
        ("confidence", {"repetition_penalty": 1.5}),
    ],
)
def test_values_without_a_meaning_with_the_floor(floor: str, values: dict[str, Any]) -> None:
    [name] = values
    asked = {"mode": "auto", **values}
    message = f"but {name} has no meaning with floor {floor} in auto mode"
    assert message in _refused({**asked, "floor": floor})[name]
    defaults = replace(LIMITS, defaults=DecodingParams(floor=Floor(floor)))
    assert message in _refused(asked, defaults)[name], "the service's floor is the request's"
    other = "confidence" if floor == "lossless" else "lossless"
    assert parse_params({**asked, "floor": other}, LIMITS).floor == other


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("floor", Floor)
def test_a_draw_is_bounded_in_every_mode(mode: Mode, floor: Floor) -> None:
    asked = {"mode": mode, "top_k": 5, "top_p": 0.5, "min_p": 0.1} | ({"floor": floor} if mode is Mode.AUTO else {})
    params = parse_params(asked, LIMITS)
    assert (params.top_k, params.top_p, params.min_p) == (5, 0.5, 0.1)


def test_off_switches_mean_the_same_everywhere() -> None:
    assert parse_params({"top_k": 0, "top_p": 1.0}, LIMITS).top_k == 0
    off = {"min_p": 0, "min_tokens": 0, "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1}
    assert not parse_params({**off, "logit_bias": {}}, LIMITS).steers


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("logit_bias", {"128": 1}, "got 128, wanted token ids from 0 to 127 as names"),
        ("logit_bias", {"07": 1}, "got '07', wanted a token id as a name"),
        ("logit_bias", {"7": math.nan}, "got nan for token 7, wanted a number in [-100, 100]"),
        ("logit_bias", [[7, 1]], "got [[7, 1]], wanted an object of token ids and numbers in [-100, 100]"),
        ("min_tokens", 17, "got 17, wanted at most max_new_tokens (16)"),
        ("presence_penalty", 2.1, "got 2.1, wanted a number in [-2, 2]"),
        ("repetition_penalty", 0, "got 0, wanted a number in [0.01, 10]"),
    ],
)
def test_what_a_request_may_not_do_to_its_logits(name: str, value: object, words: str) -> None:
    assert _refused({"mode": "ar", "max_new_tokens": 16, name: value}) == {name: words}


def test_biases_are_in_the_order_of_their_ids() -> None:
    params = parse_params({"mode": "ar", "logit_bias": {"127": 1, "5": -2.5}, "min_tokens": 128}, LIMITS)
    assert params.logit_bias == ((5, -2.5), (127, 1.0)) and params.steers and not params.penalises


def test_good_values_arrive() -> None:
    values = {
        "mode": "diffusion",
        "max_new_tokens": 33,
        "block_size": 8,
        "steps_per_block": 4,
        "confidence_threshold": 1,
        "temperature": 0,
        "seed": MAX_SEED,
        "stop_token_ids": [0, 127],
        "ignore_eos": True,
    }
    params = parse_params(values, LIMITS)
    for name, value in values.items():
        assert getattr(params, name) == (tuple(value) if isinstance(value, list) else value)
    assert isinstance(params.mode, Mode) and isinstance(params.temperature, float)
    assert parse_params({"mode": "ar", "top_k": 5, "top_p": 0.5}, LIMITS).top_p == 0.5


def test_what_is_left_out_is_the_models_default_but_for_the_seed() -> None:
    limits = ModelLimits(128, 256, defaults=DecodingParams(block_size=4, seed=9))
    first, second = parse_params({}, limits), parse_params({}, limits)
    assert first.block_size == 4
    assert first.seed != second.seed and all(0 <= p.seed < 2**53 for p in (first, second))


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        (5, "got 5, wanted a string or a list of strings"),
        (["a", 5], "wanted a string or a list of strings"),
        ("", "none of them empty"),
        (["a", ""], "none of them empty"),
        ({"a": "b"}, "wanted a string or a list of strings"),
        (None, "got None, wanted a string"),
        (["a"] * 17, "got 17 strings, wanted at most 16"),
        ("x" * (MAX_STOP_CHARACTERS + 1), "got a string of 257 characters, wanted at most 256"),
        ("\ud800", "half a surrogate pair"),
    ],
)
def test_stop_strings(stop: object, words: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(words)) as caught:
        parse_stop(stop)
    assert [problem.field for problem in caught.value.problems] == ["stop"]


def test_good_stop_strings() -> None:
    assert parse_stop("\n") == ("\n",)
    assert parse_stop(["a", "b"]) == ("a", "b")
    assert parse_stop([]) == ()
    assert check_text("prompt", "🦊") == "🦊"


def test_scoring_joins_prompt_and_continuation() -> None:
    request = make_score_request("s", [5, 6], (7,), LIMITS, -1)
    assert (request.token_ids, request.start, request.priority, request.positions) == ((5, 6, 7), 2, -1, 2)
    assert make_score_request("s", [5] * 255, [6], LIMITS).start == 255


@pytest.mark.parametrize(
    ("prompt", "continuation", "priority", "wanted"),
    [
        ([], [5], 0, {"prompt": "got an empty prompt, wanted at least one token"}),
        ([5], [], 0, {"continuation": "got an empty continuation, wanted at least one token"}),
        ([5], "text", 0, {"continuation_token_ids": "got 'text', wanted a list of token ids"}),
        (None, [5], 0, {"prompt_token_ids": "got None, wanted a list of token ids"}),
        ([5], [6, 128], 0, {"continuation_token_ids[1]": "got 128, wanted a token id from 0 to 127"}),
        ([True], [6], 0, {"prompt_token_ids[0]": "got True, wanted a token id from 0 to 127"}),
        ([5], [6], 1.0, {"priority": "got 1.0, wanted an integer from -2147483648 to 2147483647"}),
        (
            [5] * 256,
            [5],
            0,
            {
                "continuation": "got a prompt of 256 tokens and a continuation of 1 (257 together), "
                "wanted at most 256 together"
            },
        ),
    ],
)
def test_bad_scoring(prompt: Any, continuation: Any, priority: Any, wanted: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_score_request("s", prompt, continuation, LIMITS, priority)
    assert {problem.field: problem.message for problem in caught.value.problems} == wanted


def test_all_that_is_wrong_with_scoring_is_told_at_once() -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_score_request("s", [], [-1], LIMITS, None)
    assert [problem.field for problem in caught.value.problems] == ["prompt", "continuation_token_ids[0]", "priority"]


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**300, 10**310), st.floats(), st.text(), st.binary()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2), max_leaves=4
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(), VALUES, max_size=5), VALUES)
def test_nothing_but_invalid_request_is_ever_raised(values: dict[str, Any], other: Any) -> None:
    for limits in (LIMITS, AR_ONLY):
        try:
            params = parse_params(values, limits)
        except InvalidRequest as error:
            assert error.problems and "\n" not in str(error)
        else:
            assert params.mode in limits.modes
    for check in (
        lambda: check_part("prompt", other, LIMITS),
        lambda: parse_stop(other),
        lambda: check_text("prompt", other),
    ):
        try:
            check()
        except InvalidRequest as error:
            assert error.problems and "\n" not in str(error)
