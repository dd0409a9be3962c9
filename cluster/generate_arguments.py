"""The arguments of `python -m cluster generate`, named as `python -m twotower generate` names them, as a request."""

import argparse

from twotower.errors import InvalidRequest
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.validation import show

_INTEGERS = ("max_new_tokens", "block_size", "steps_per_block", "top_k", "seed")
_NUMBERS = ("confidence_threshold", "temperature", "top_p")
_MODES = ("diffusion", "mock_ar", "ar")


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """What is not given takes the service's default."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-token-ids", metavar="5,9,11", help="token ids instead of text")
    parser.add_argument("--mode", choices=_MODES)
    for name in _INTEGERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    for name in _NUMBERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    parser.add_argument("--ignore-eos", action="store_true", default=None)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--priority", type=int, default=0, metavar="N", help="where requests wait, lower goes first")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after so long")
    parser.add_argument("--address", metavar="HOST:PORT", help="the service's gRPC address; default: the one you run")


def request_of(options: argparse.Namespace) -> pb.GenerateRequest:
    """The message to send. Raises InvalidRequest for what cannot be written as one."""
    try:
        params = pb.DecodingParams(mode=f"MODE_{options.mode.upper()}" if options.mode else pb.MODE_UNSPECIFIED)
        for name in (*_INTEGERS, *_NUMBERS, "ignore_eos"):
            if getattr(options, name) is not None:
                setattr(params, name, getattr(options, name))
        request = pb.GenerateRequest(params=params, stop=options.stop, priority=options.priority)
        if options.prompt is not None:
            request.text = options.prompt
        else:
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(_ids(options.prompt_token_ids))
    except (ValueError, UnicodeError) as error:
        raise InvalidRequest.of("arguments", str(error)) from None
    return request


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequest.of("prompt_token_ids", f"got {show(text)}, wanted ids such as 5,9,11") from None
