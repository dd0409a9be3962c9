"""The flags of `bench`, and the plan that follows from them: which passes are run, and what each request asks for."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.commands.bench.load import MAX_CLIENTS, MAX_RATE, MAX_REQUESTS, MAX_REQUESTS_IN_ALL, MAX_SECONDS, Load
from twotower.commands.parameter_flags import add_parameter_flags, add_priority_flag, as_sent, given_parameters
from twotower.core import PARAMETERS, Mode
from twotower.errors import InvalidRequest
from twotower.parameters import check_text
from twotower.validation import check_priority, check_values

DEFAULT_URL = "grpc://127.0.0.1:50051"
DEFAULT_REQUESTS = 200
DEFAULT_CONNECTIONS, MAX_CONNECTIONS = 8, 256
MAX_ROUNDS, MAX_PASSES, MAX_WARM_UP = 100, 1_000, 10_000
MAX_SEED = 2**62  # of the run; a request's is this and its number
DESCRIPTION = """Put a load on a running service, and say what its clients saw: tokens and requests per second, time to
the first tokens, time between blocks, latency, tokens a step, accepted drafts a round, errors.

Closed loop (--clients): each client sends its next request when its last one has ended.
Open loop (--rate): requests come at random times (Poisson), whether or not earlier ones have ended. Latency counts
from the moment when a request was due.
"""
EPILOG = """examples:
  three modes, by one client and by sixteen, in turns; a table here, and run.json, run.md, run.png:
    python -m twotower bench --mode ar,diffusion,verified --clients 1,16 --requests 200 --rounds 3 --output run

  5 requests a second for a minute over HTTP, prompts of your own; then two runs side by side:
    python -m twotower bench --url http://127.0.0.1:8000 --rate 5 --seconds 60 --prompts prompts.jsonl --output new
    python -m twotower bench --compare old.json new.json

A key is taken from the variable TWOTOWER_API_KEY. The load's own process should have a core to itself: the report
says how much of one it used.
exit status: 0 done; 1 the service failed, or requests did; 2 input that cannot be used; 130 Ctrl-C
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. `params`: for each mode, the given parameters that have a meaning in it."""

    url: str
    tls: tuple[Path | None, Path | None, Path | None]  # root certificates, certificate, key
    loads: tuple[Load, ...]
    modes: tuple[str | None, ...]
    params: dict[str | None, dict[str, Any]]
    rounds: int
    warm_up: int | None
    seed: int
    prompts: Path | None
    family: str | None
    timeout_s: float
    devices: int | None
    output: Path | None
    connections: int | None = None

    def connected(self, load: Load) -> int:
        """The number of connections of a pass of this load; at most one for each client."""
        return min(self.connections or DEFAULT_CONNECTIONS, load.clients or MAX_CONNECTIONS)

    def warm_ups(self, load: Load) -> int:
        """The number of requests sent before a pass of this load."""
        return 2 * (load.clients or 4) if self.warm_up is None else self.warm_up

    def options(self, mode: str | None, number: int) -> dict[str, Any]:
        """The options of request `number`; apart from the mode, the same in every mode, load and round."""
        return {"seed": self.seed + number, "timeout_s": self.timeout_s, **self.params[mode]}


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", default=DEFAULT_URL, help="the service: grpc://HOST:PORT, grpcs://, http://, https:// (%(default)s)")
    add("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="compare two runs, without a load")
    _add_load(parser.add_argument_group("load"))
    add = parser.add_argument_group("prompts").add_argument
    text = ".jsonl: objects with prompt or prompt_token_ids; else a prompt a line"
    add("--prompts", type=Path, metavar="FILE", help=text)
    add("--family", metavar="NAME", help="only this one of the demo's tasks (default: all, held out)")
    decoding = parser.add_argument_group("decoding", "A parameter that is not given takes the service's default.")
    modes = f"one pass each: {', '.join(Mode)} (the service's default)"
    decoding.add_argument("--mode", type=_list(_mode), metavar="A,B", help=modes)
    decides = "seed of prompts, times and draws (1)"
    decoding.add_argument("--seed", type=_whole(MAX_SEED, 0), default=1, metavar="N", help=decides)
    add_parameter_flags(decoding, own_defaults=False, without=("mode", "seed"))
    add_priority_flag(decoding)
    add = parser.add_argument_group("result").add_argument
    add("--output", type=Path, metavar="PREFIX", help="also write PREFIX.json, PREFIX.md, PREFIX.png")
    devices = "the service's GPUs: also report tokens/s per device"
    add("--devices", type=_whole(10_000), metavar="N", help=devices)
    add = parser.add_argument_group("TLS", "Files in PEM, for grpcs:// and https://.").add_argument
    add("--root-certificates", type=Path, metavar="FILE", help="trusted certificates (default: the system's)")
    add("--certificate", type=Path, metavar="FILE", help="the client's own certificate, with --key")
    add("--key", type=Path, metavar="FILE", help="of --certificate")


def _add_load(load: argparse._ArgumentGroup) -> None:
    how, add = load.add_mutually_exclusive_group(), load.add_argument
    closed = f"closed loop: clients at once, up to {MAX_CLIENTS} (1)"
    how.add_argument("--clients", type=_list(_whole(MAX_CLIENTS)), metavar="1,16", help=closed)
    opened = f"open loop: requests a second, up to {MAX_RATE:g}"
    how.add_argument("--rate", type=_list(_number(MAX_RATE)), metavar="2,8", help=opened)
    requests = f"requests of each pass, up to {MAX_REQUESTS} ({DEFAULT_REQUESTS}, or as --seconds allow)"
    add("--requests", type=_whole(MAX_REQUESTS), metavar="N", help=requests)
    add("--seconds", type=_number(MAX_SECONDS), metavar="S", help="how long each pass takes new requests")
    warm_up = "requests before each pass that are not counted (2 a client, 8 in an open loop)"
    add("--warm-up", type=_whole(MAX_WARM_UP, 0), metavar="N", help=warm_up)
    add("--rounds", type=_whole(MAX_ROUNDS), default=1, metavar="N", help="rounds of all passes, in turn (1)")
    connections = (
        f"to the service, each to a router of its own choice, but no more than clients ({DEFAULT_CONNECTIONS})"
    )
    add("--connections", type=_whole(MAX_CONNECTIONS), metavar="N", help=connections)
    add("--timeout", type=_number(MAX_SECONDS), default=120.0, metavar="S", help="deadline of a request (120)")


def plan_of(options: argparse.Namespace) -> Plan:
    """Raises InvalidRequest for contradictory flags."""
    requests = options.requests or (None if options.seconds else DEFAULT_REQUESTS)
    ends = {"requests": requests, "seconds": options.seconds}
    if options.rate is not None:
        loads = tuple(Load(None, rate, **ends) for rate in options.rate)
    else:
        loads = tuple(Load(clients, None, **ends) for clients in options.clients or [1])
    modes: tuple[str | None, ...] = tuple(options.mode or [None])
    if len(loads) * len(modes) * options.rounds > MAX_PASSES:
        raise InvalidRequest.of("--rounds", f"got more than {MAX_PASSES} passes in all")
    if len(loads) * len(modes) * options.rounds * (requests or 1) > MAX_REQUESTS_IN_ALL:
        raise InvalidRequest.of("--requests", f"got more than {MAX_REQUESTS_IN_ALL} in all passes together")
    if options.prompts is not None and options.family is not None:
        raise InvalidRequest.of("--family", "got --prompts too, wanted one of them")
    return Plan(
        options.url,
        (options.root_certificates, options.certificate, options.key),
        loads,
        modes,
        _params(options, modes),
        options.rounds,
        options.warm_up,
        options.seed,
        options.prompts,
        options.family,
        options.timeout,
        options.devices,
        options.output,
        options.connections,
    )


def _params(options: argparse.Namespace, modes: tuple[str | None, ...]) -> dict[str | None, dict[str, Any]]:
    """The parameters of each mode. A parameter without a meaning in any of the modes is a mistake."""
    given = {name: value for name, value in given_parameters(options).items() if name not in ("mode", "seed")}
    values = as_sent(check_values(given))
    beside: dict[str, Any] = {"priority": check_priority(options.priority)}
    if options.stop:
        beside["stop"] = [check_text("stop", text) for text in options.stop]
    params: dict[str | None, dict[str, Any]] = {}
    for mode in modes:
        meant = {
            name for name in values if mode is None or not PARAMETERS[name].modes or mode in PARAMETERS[name].modes
        }
        params[mode] = {**beside, **{name: values[name] for name in sorted(meant)}, **({"mode": mode} if mode else {})}
    for name in values:
        if not any(name in meant for meant in params.values()):
            raise InvalidRequest.of(name, f"has no meaning in {', '.join(str(mode) for mode in modes)}")
    return params


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        return list(dict.fromkeys(kind(part.strip()) for part in text.split(",")))

    return read


def _whole(most: int, least: int = 1) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number from {least} to {most}")
        return int(text)

    return read


def _number(most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text.replace("_", "?"))
        except ValueError:
            value = math.nan
        if not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number above 0 and at most {most:g}")
        return value

    return read


def _mode(text: str) -> str:
    if text not in tuple(Mode):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted one of {', '.join(Mode)}")
    return text
