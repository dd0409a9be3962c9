"""The arguments of `python -m cluster generate`, named as in `python -m twotower generate`, as a request.

Checks what can be checked without a model, in the words of `twotower.validation`; the service checks the rest.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from cluster.cli.flag_types import host_and_port, seconds
from twotower.commands.parameter_flags import (
    add_parameter_flags,
    add_priority_flag,
    add_telling_flags,
    as_sent,
    given_parameters,
    given_telling,
)
from twotower.commands.parser import ids
from twotower.core import PARAMETERS
from twotower.parameters import TokenIds, check_text
from twotower.validation import check_logprobs, check_priority, check_token_ids, check_values

_LARGEST_ID = 2**32 - 1  # of the message's uint32


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """A missing flag takes the service's default."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt as text")
    prompt.add_argument("--prompt-token-ids", type=ids, metavar="5,9,11", help="the prompt as token ids")
    add_parameter_flags(parser.add_argument_group("decoding"), own_defaults=False)
    add_telling_flags(parser.add_argument_group("telling"))
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    add_priority_flag(parser)
    parser.add_argument("--timeout", type=seconds, metavar="SECONDS", help="give up after so long")
    parser.add_argument(
        "--address",
        type=host_and_port,
        metavar="HOST:PORT",
        help="gRPC address of the service (default: the one you run)",
    )


def request_of(options: argparse.Namespace) -> tuple[str | tuple[int, ...], dict[str, Any]]:
    """The prompt, and the client's options. Raises InvalidRequest for what cannot be sent."""
    telling = given_telling(options)
    asked = {
        **_params(given_parameters(options)),
        "stop": [check_text("stop", text) for text in options.stop],
        "priority": check_priority(options.priority),
        "trace": bool(telling.get("trace")),
        "logprobs": check_logprobs(telling.get("logprobs")),
    }
    if options.prompt is not None:
        return check_text("prompt", options.prompt), asked
    return _ids("prompt_token_ids", options.prompt_token_ids), asked


def _params(given: dict[str, object]) -> dict[str, Any]:
    values = check_values(given)
    for name, value in values.items():
        if isinstance(PARAMETERS[name].kind, TokenIds):
            values[name] = _ids(name, value)
    return as_sent(values)


def _ids(name: str, token_ids: Sequence[object]) -> tuple[int, ...]:
    """Only the service knows the model's vocabulary."""
    return check_token_ids(name, token_ids, _LARGEST_ID + 1)
