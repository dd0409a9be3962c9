"""The arguments of `python -m cluster generate`, named as `python -m twotower generate` names them, as a request.

Looks at what can be judged without a model, in the words of `twotower.validation`; the service judges the rest.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from cluster.flag_types import host_and_port, seconds
from twotower.commands.parser import ids, number
from twotower.core import Mode
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.validation import check_priority, check_text, check_token_ids, check_values

_INTEGERS = ("max_new_tokens", "block_size", "steps_per_block", "top_k", "seed")
_NUMBERS = ("confidence_threshold", "temperature", "top_p")
_PARAMS = ("mode", *_INTEGERS, *_NUMBERS, "stop_token_ids", "ignore_eos")
_LARGEST_ID = 2**32 - 1  # of the message's uint32


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """What is not given takes the service's default."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-token-ids", type=ids, metavar="5,9,11", help="token ids instead of text")
    parser.add_argument("--mode", metavar="MODE", help=" | ".join(Mode))
    for names, metavar in ((_INTEGERS, "N"), (_NUMBERS, "X")):
        for name in names:
            parser.add_argument(f"--{name.replace('_', '-')}", type=number, metavar=metavar)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    parser.add_argument("--stop-token-ids", type=ids, metavar="7,8", help="end the answer after any of these")
    parser.add_argument("--ignore-eos", action="store_true", default=None)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--priority", type=number, default=0, metavar="N", help="where requests wait, lower goes first")
    parser.add_argument("--timeout", type=seconds, metavar="SECONDS", help="give up after so long")
    parser.add_argument(
        "--address",
        type=host_and_port,
        metavar="HOST:PORT",
        help="its gRPC address; default: the service you run",
    )


def request_of(options: argparse.Namespace) -> pb.GenerateRequest:
    """The message to send. Raises InvalidRequest for what cannot be written as one."""
    request = pb.GenerateRequest(
        params=_params({name: getattr(options, name) for name in _PARAMS if getattr(options, name) is not None}),
        stop=[check_text("stop", text) for text in options.stop],
        priority=check_priority(options.priority),
    )
    if options.prompt is not None:
        request.text = check_text("prompt", options.prompt)
    else:
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(_ids("prompt_token_ids", options.prompt_token_ids))
    return request


def _params(given: dict[str, object]) -> pb.DecodingParams:
    values: dict[str, Any] = check_values(given)
    mode = values.pop("mode", None)
    values["stop_token_ids"] = _ids("stop_token_ids", values.get("stop_token_ids", ()))
    return pb.DecodingParams(mode=pb.MODE_UNSPECIFIED if mode is None else f"MODE_{mode.upper()}", **values)


def _ids(name: str, token_ids: Sequence[object]) -> tuple[int, ...]:
    """Which ids the model has, only the service knows."""
    return check_token_ids(name, token_ids, _LARGEST_ID + 1)
