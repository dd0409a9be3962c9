"""`python -m cluster generate`: which request its arguments make, and what cannot be one."""

import argparse

import pytest

from cluster.cli.generate_arguments import add_generate_arguments, request_of
from cluster.cli.main import main
from twotower.core import PARAMETERS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_generate_arguments(parser)
    return parser


def _request(*arguments: str) -> tuple[object, dict[str, object]]:
    return request_of(_parser().parse_args(arguments))


def test_only_what_was_given_is_sent() -> None:
    assert _request("--prompt", "a") == ("a", {"stop": [], "priority": 0, "logprobs": None, "trace": False})
    full = _request(
        *"--prompt-token-ids 5,6 --mode mock_ar --max-new-tokens 3 --top-p .5 --seed 0 --stop x --ignore-eos "
        "--stop-token-ids 7,8 --priority -2 --logprobs 0".split()
    )
    params = {"mode": "mock_ar", "max_new_tokens": 3, "top_p": 0.5, "seed": 0, "ignore_eos": True}
    assert full == (
        (5, 6),
        {**params, "stop_token_ids": (7, 8), "stop": ["x"], "priority": -2, "logprobs": 0, "trace": False},
    )


def test_every_parameter_is_a_flag() -> None:
    """The names that docs/parameters.md promises everywhere."""
    told = _parser().format_help()
    assert all(f"--{name.replace('_', '-')}" in told for name in (*PARAMETERS, "stop", "priority", "logprobs", "trace"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt-token-ids", "99999999999"], "prompt_token_ids[0]: got 99999999999, wanted a token id from 0 to"),
        (["--prompt-token-ids", "5,-1"], "prompt_token_ids[1]: got -1, wanted a token id from 0 to 4294967295"),
        (["--prompt-token-ids", "5,x"], "prompt_token_ids[1]: got 'x'"),
        (["--prompt-token-ids", "-5,6"], "--prompt-token-ids: expected one argument (a value that begins with - is"),
        (["--prompt-token-ids=-5,6"], "prompt_token_ids[0]: got -5"),
        (["--stop-token-ids", "7,4294967296"], "stop_token_ids[1]: got 4294967296"),
        (["--max-new-tokens", "abc"], "max_new_tokens: got 'abc', wanted an integer from 1"),
        (["--max-new-tokens", "1_0"], "max_new_tokens: got '1_0'"),
        (["--max-new-tokens", str(2**63)], f"max_new_tokens: got {2**63}, wanted an integer from 1 to {2**31 - 1}"),
        (["--top-k", "9" * 5000], "top_k: got inf, wanted an integer from 0"),
        (["--seed", "-1"], f"seed: got -1, wanted an integer from 0 to {2**63 - 1}"),
        (["--seed", str(2**63)], f"seed: got {2**63}, wanted an integer from 0"),
        (["--priority", "2147483648"], "priority: got 2147483648, wanted an integer from -2147483648 to 2147483647"),
        (["--priority", "high"], "priority: got 'high'"),
        (["--temperature", "nan"], "temperature: got nan, wanted a number in [0, 1000]"),
        (["--logprobs", "21"], "logprobs: got 21, wanted an integer from 0 to 20"),
        (["--logprobs=-1"], "logprobs: got -1, wanted an integer from 0 to 20"),
        (["--logprobs", "all"], "logprobs: got 'all', wanted an integer from 0 to 20"),
        (["--mode", "fast"], "mode: got 'fast', wanted one of diffusion, mock_ar, ar, verified, auto"),
        (["--prompt", "caf\udce9"], "prompt: got text with half a surrogate pair"),
        (["--timeout", "nan"], "--timeout: got 'nan', wanted seconds, above 0"),
        (["--timeout=-1"], "--timeout: got '-1', wanted seconds, above 0"),
        (["--timeout", "1e10"], "--timeout: got '1e10', wanted seconds, above 0 and at most"),
        (["--address", "nonsense"], "--address: got 'nonsense', wanted HOST:PORT, such as 127.0.0.1:50051"),
        (["--address", "localhost:99999"], "--address: got '99999', wanted a port from 1 to 65535"),
        (["--max-new-token", "5"], "unrecognized arguments: --max-new-token"),
    ],
)
def test_a_bad_value_is_one_line_and_nothing_is_sent(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [] if any("--prompt" in argument for argument in arguments) else ["--prompt", "a"]
    try:
        code: object = main(["generate", *prompt, *arguments])
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2 and words in error and error.count("\n") == 1, error


@pytest.mark.parametrize("address", ["127.0.0.1:50051", "localhost:1", "[::1]:50051", "[fe80::1%eth0]:9"])
def test_good_addresses(address: str) -> None:
    assert _parser().parse_args(["--prompt", "a", "--address", address]).address == address
