"""What our own commands ask of a running service, through its client, with errors in words for a person.

A command is its user's one try: it is told at once what is wrong, and asks nothing again by itself.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.ops.invocation import command
from twotower.core import COSTS
from twotower.errors import ConfigError, TwoTowerError, Unavailable
from twotower_client import Block, Client, InvalidRequest, ModelInfo, RetryPolicy, ServiceError, Stream, Unauthenticated
from twotower_client import Unavailable as Unanswered
from twotower_client.target import KEY_VARIABLE, target_of

ONCE = RetryPolicy(attempts=1)


class Refused(TwoTowerError):
    """The service said no; `mistake` where the request was at fault."""

    def __init__(self, message: str, mistake: bool) -> None:
        super().__init__(message)
        self.mistake = mistake


def is_ready(address: str, timeout_s: float = 2.0) -> bool:
    """Whether `/ready` says so."""
    return served(address, timeout_s) is not None


def served(address: str, timeout_s: float = 2.0) -> Mapping[str, bool] | None:
    """Of each mode whether it is served now, by `/ready`; None where the service is not ready."""
    with Client(f"http://{address}", api_key="", retry=ONCE) as client:
        told = client.ready(timeout_s)
    return told.modes if told.ready else None


def credentials() -> list[tuple[str, str]]:
    """As headers: the key in this variable of the environment, where there is one. Raises ConfigError."""
    try:
        return target_of("http://unused").credentials
    except ValueError as error:
        raise ConfigError(str(error)) from None


@contextmanager
def asked(address: str) -> Iterator[Client]:
    """A client of the service at this gRPC address. What goes wrong is Refused or Unavailable; what cannot be an
    address or a key, ConfigError."""
    try:
        client = Client(f"grpc://{address}", retry=ONCE)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with client:
        try:
            yield client
        except ServiceError as error:
            raise explained(error, address) from None


def model_info(address: str, timeout_s: float = 5.0) -> ModelInfo:
    """Raises Refused or Unavailable."""
    with asked(address) as client:
        return client.model(timeout_s)


def generate(address: str, prompt: Any, options: Mapping[str, Any], as_json: bool) -> None:
    """Prints the answer: text as it comes, or one JSON object. Raises Refused or Unavailable."""
    with asked(address) as client:
        if as_json:
            with client.stream(prompt, **options) as stream:
                _print_json(stream)
        else:
            has_text = client.model(options.get("timeout_s")).has_tokenizer
            with client.stream(prompt, **options) as stream:
                _print_text(stream, bool(has_text))


def explained(error: ServiceError, address: str) -> Unavailable | Refused:
    """What to tell a person of a call's error."""
    if isinstance(error, Unanswered) and "resol" in error.message:
        return Unavailable(f"{address}: no such host")
    if isinstance(error, Unanswered) and "connect" in error.message:
        return Unavailable(f"no service answers on {address}; start one with: {command('up')}")
    if isinstance(error, Unanswered):
        return Unavailable(f"{address}: {error}")
    if isinstance(error, Unauthenticated):
        return Refused(f"{address}: {error}; this command sends what the variable {KEY_VARIABLE} holds", True)
    return Refused(str(error), isinstance(error, InvalidRequest))


def _print_text(stream: Stream, has_text: bool) -> None:
    """Token ids only where the service has no text at all: a block's text may lag behind its tokens."""
    for event in stream:
        if isinstance(event, Block):
            print(event.text if has_text else "".join(f"{token} " for token in event.token_ids), end="", flush=True)
    print()


def _print_json(stream: Stream) -> None:
    answer = stream.rest()
    how = {"mode": answer.mode, "seed": answer.seed, "request_id": answer.request_id}
    costs = {name: getattr(answer.usage, name) for name in COSTS}
    whole = {"token_ids": answer.token_ids, "text": answer.text, "finish_reason": answer.finish_reason}
    json.dump({**whole, **costs, **how}, sys.stdout, ensure_ascii=False)
    print()
