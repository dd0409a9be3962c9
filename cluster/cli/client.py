"""What our own commands ask of a running service: whether it is ready, what it serves, an answer to a prompt.

They name the address they mean, so the proxies of the environment have no say.
"""

import http.client
import json
import os
import sys
from collections.abc import Iterable
from typing import Any

import grpc

from cluster.cli import tls
from cluster.cli.answers import HeardTexts, told_by
from cluster.ops.invocation import command
from twotower.commands.told import Piece, logprobs_json, trace_json
from twotower.commands.views import View, view_of
from twotower.core import COSTS, Likelihood, TraceEvent
from twotower.errors import ConfigError, TwoTowerError, Unavailable
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

KEY_VARIABLE = "TWOTOWER_API_KEY"
_OF_TLS = (
    "Socket closed",
    "Handshake",
    "VERIFY_FAILED",
    "Verification",
)  # where one end speaks TLS, or trusts nobody there


class Refused(TwoTowerError):
    """The service said no; `mistake` where the request was at fault."""

    def __init__(self, message: str, mistake: bool) -> None:
        super().__init__(message)
        self.mistake = mistake


def is_ready(address: str, timeout_s: float = 2.0, over_tls: bool = False) -> bool:
    """Whether `/ready` says so."""
    return served(address, timeout_s, over_tls) is not None


def served(address: str, timeout_s: float = 2.0, over_tls: bool = False) -> dict[str, bool] | None:
    """Of each mode whether it is served now, by `/ready`; None where the service is not ready."""
    try:
        with tls.probed(f"{'https' if over_tls else 'http'}://{address}/ready", timeout_s) as response:
            modes = json.load(response)["modes"] if response.status == 200 else None
            return None if modes is None else {str(mode): bool(serves) for mode, serves in modes.items()}
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError):
        return None


def credentials() -> list[tuple[str, str]]:
    """As headers, or metadata: the key in this variable of the environment, where there is one. Raises ConfigError."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"{KEY_VARIABLE}: holds a character that no key has")
    return [("authorization", f"Bearer {key}")] if key else []


def generate(address: str, request: pb.GenerateRequest, timeout_s: float | None, as_json: bool) -> None:
    """Prints the answer: text as it comes, or one JSON object. Raises Refused or Unavailable."""
    with tls.channel(address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        try:
            told = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout_s, metadata=credentials())
            answer, texts = stub.GenerateStream(request, timeout=timeout_s, metadata=credentials()), HeardTexts()
            if as_json:
                _print_json(answer, request, texts, told.has_tokenizer)
            else:
                view = view_of(request.trace, request.HasField("logprobs"), texts)
                _print_text(answer, view, texts, told.has_tokenizer)
        except grpc.RpcError as error:
            raise explained(error, address) from None


def model_info(address: str, timeout_s: float = 5.0) -> pb.GetModelInfoResponse:
    """Raises Refused or Unavailable."""
    with tls.channel(address) as channel:
        try:
            info: pb.GetModelInfoResponse = pb_grpc.GenerationServiceStub(channel).GetModelInfo(
                pb.GetModelInfoRequest(), timeout=timeout_s, metadata=credentials()
            )
            return info
        except grpc.RpcError as error:
            raise explained(error, address) from None


def mode_names(modes: Iterable[int]) -> list[str]:
    return [pb.Mode.Name(mode).removeprefix("MODE_").lower() for mode in modes]


def _print_text(events: Iterable[pb.GenerateStreamResponse], view: View, texts: HeardTexts, has_text: bool) -> None:
    """Token ids only where the service has no text at all: a block's text may lag behind its tokens."""
    for event in events:
        told = told_by(event, texts, has_text)
        if told is not None:
            view.hear(told)
    view.end()


def _print_json(
    events: Iterable[pb.GenerateStreamResponse], request: pb.GenerateRequest, texts: HeardTexts, has_text: bool
) -> None:
    result: dict[str, Any] = {"token_ids": [], "text": ""}
    likelihoods, trace = list[Likelihood](), list[TraceEvent]()
    for event in events:
        told = told_by(event, texts, has_text)
        if isinstance(told, Piece):
            result["token_ids"] += told.token_ids
            result["text"] += event.block.text
            likelihoods += told.likelihoods
        elif told is not None:
            trace.append(told)
        else:
            result |= _finished(event)
    if request.HasField("logprobs"):
        result["logprobs"] = logprobs_json(result["token_ids"], likelihoods, texts)
    if request.trace:
        result["trace"] = trace_json(trace, texts)
    json.dump(result, sys.stdout, ensure_ascii=False)
    print()


def _finished(event: pb.GenerateStreamResponse) -> dict[str, Any]:
    done = event.finished
    reason = pb.FinishReason.Name(done.finish_reason).removeprefix("FINISH_REASON_").lower()
    costs = {name: getattr(done.usage, name) for name in COSTS}
    how = {"mode": mode_names([done.mode])[0], "seed": done.seed, "request_id": event.request_id}
    return {"finish_reason": reason} | costs | how


def explained(error: Any, address: str) -> Unavailable | Refused:
    """What to tell a person of a call's error."""
    if error.code() is grpc.StatusCode.UNAVAILABLE and "resol" in error.details():
        return Unavailable(f"{address}: no such host")
    if error.code() is grpc.StatusCode.UNAVAILABLE and any(word in error.details() for word in _OF_TLS):
        wanted = (
            f"{tls.CA_VARIABLE} names the certificates to trust, {tls.CERT_VARIABLE} and {tls.KEY_VARIABLE} our own"
        )
        return Unavailable(f"{address}: no connection; does it speak TLS? {wanted}: {error.details()}")
    if error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in error.details():
        return Unavailable(f"no service answers on {address}; start one with: {command('up')}")
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"{address}: {error.details()}")
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return Refused(f"{address}: {error.details()}; this command sends what the variable {KEY_VARIABLE} holds", True)
    return Refused(error.details(), error.code() is grpc.StatusCode.INVALID_ARGUMENT)
