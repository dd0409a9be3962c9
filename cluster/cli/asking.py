"""Our commands' calls to a running service, through its client, with errors for people.

A command tries once: it reports an error at once and repeats nothing by itself.
"""

import http.client
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.cli import tls
from cluster.cli.answers import HeardTexts, told_by
from cluster.ops.invocation import command
from twotower.commands.told import Piece, logprobs_json, trace_json
from twotower.commands.views import View, view_of
from twotower.core import COSTS, Likelihood, TraceEvent
from twotower.errors import ConfigError, TwoTowerError, Unavailable
from twotower_client import (
    Client,
    InvalidRequest,
    ModelInfo,
    RetryPolicy,
    ServiceError,
    Stream,
    TlsMistake,
    Unauthenticated,
)
from twotower_client import Unavailable as Unanswered
from twotower_client.target import KEY_VARIABLE, target_of

ONCE = RetryPolicy(attempts=1)
# If only one end speaks TLS, or one end does not trust the other.
_OF_TLS = ("Socket closed", "Handshake", "VERIFY_FAILED", "Verification")


class Refused(TwoTowerError):
    """The service refused the request; `mistake`: the request was wrong."""

    def __init__(self, message: str, mistake: bool) -> None:
        super().__init__(message)
        self.mistake = mistake


def is_ready(address: str, timeout_s: float = 2.0, over_tls: bool = False) -> bool:
    """Whether `/ready` says so."""
    return served(address, timeout_s, over_tls) is not None


def served(address: str, timeout_s: float = 2.0, over_tls: bool = False) -> Mapping[str, bool] | None:
    """For each mode whether it is served now, by `/ready`; None if the service is not ready."""
    try:
        with tls.probed(f"{'https' if over_tls else 'http'}://{address}/ready", timeout_s) as response:
            modes = json.load(response)["modes"] if response.status == 200 else None
            return None if modes is None else {str(mode): bool(serves) for mode, serves in modes.items()}
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError):
        return None


def credentials() -> list[tuple[str, str]]:
    """Headers with the key in this environment variable, if there is one. Raises ConfigError."""
    try:
        return target_of("http://unused").credentials
    except ValueError as error:
        raise ConfigError(str(error)) from None


@contextmanager
def asked(address: str) -> Iterator[Client]:
    """A client of the service at this gRPC address. Errors are Refused or Unavailable, or ConfigError for an invalid
    address or key.
    """
    url, trust = tls.grpc_target(address)
    try:
        client = Client(url, tls=trust, retry=ONCE)
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
        has_text, texts = bool(client.model(options.get("timeout_s")).has_tokenizer), HeardTexts()
        with client.stream(prompt, **options) as stream:
            if as_json:
                _print_json(stream, options, texts, has_text)
            else:
                logprobs = options.get("logprobs") is not None
                _print_text(stream, view_of(bool(options.get("trace")), logprobs, texts), texts, has_text)


def explained(error: ServiceError, address: str) -> Unavailable | Refused:
    """A call's error in words for people."""
    if isinstance(error, Unanswered) and "resol" in error.message:
        return Unavailable(f"{address}: no such host")
    of_tls = isinstance(error, Unanswered) and any(word in error.message for word in _OF_TLS)
    if of_tls or isinstance(error, TlsMistake):
        wanted = (
            f"{tls.CA_VARIABLE} names the certificates to trust, {tls.CERT_VARIABLE} and {tls.KEY_VARIABLE} our own"
        )
        return Unavailable(f"{address}: no connection; does it speak TLS? {wanted}: {error.message}")
    if isinstance(error, Unanswered) and "connect" in error.message:
        return Unavailable(f"no service answers on {address}; start one with: {command('up')}")
    if isinstance(error, Unanswered):
        return Unavailable(f"{address}: {error}")
    if isinstance(error, Unauthenticated):
        return Refused(f"{address}: {error}; this command sends what the variable {KEY_VARIABLE} holds", True)
    return Refused(str(error), isinstance(error, InvalidRequest))


def _print_text(stream: Stream, view: View, texts: HeardTexts, has_text: bool) -> None:
    """Prints token ids only if the service sends no text at all: a block's text may lag behind its tokens."""
    for event in stream:
        told = told_by(event, texts, has_text)
        if told is not None:
            view.hear(told)
    view.end()


def _print_json(stream: Stream, options: Mapping[str, Any], texts: HeardTexts, has_text: bool) -> None:
    likelihoods, trace = list[Likelihood](), list[TraceEvent]()
    for event in stream:
        told = told_by(event, texts, has_text)
        if isinstance(told, Piece):
            likelihoods += told.likelihoods
        elif told is not None:
            trace.append(told)
    answer = stream.rest()
    result: dict[str, Any] = {"token_ids": answer.token_ids, "text": answer.text}
    result["finish_reason"] = answer.finish_reason
    result |= {name: getattr(answer.usage, name) for name in COSTS}
    result |= {"mode": answer.mode, "seed": answer.seed, "request_id": answer.request_id}
    if options.get("logprobs") is not None:
        result["logprobs"] = logprobs_json(answer.token_ids, likelihoods, texts)
    if options.get("trace"):
        result["trace"] = trace_json(trace, texts)
    json.dump(result, sys.stdout, ensure_ascii=False)
    print()
