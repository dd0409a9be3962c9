"""The command line: `up`, `status`, `down`, `generate`, `tune`. Exit code 2: a mistake in the input; 1: a failure."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cluster import run_state
from cluster.config import load_config
from cluster.flag_types import port
from cluster.generate_arguments import add_generate_arguments, request_of
from cluster.run_state import RunState
from cluster.tune import command as tune_command
from twotower.commands.parser import Parser
from twotower.errors import ConfigError, InvalidRequest, TwoTowerError
from twotower.validation import one_line

_DESCRIPTION = "Serve a two-tower diffusion language model on this machine, and talk to it."
_EXAMPLES = """examples:
  python -m cluster up                                            the demo checkpoint on 127.0.0.1
  python -m cluster up --set model.checkpoint=/models/twotower    another checkpoint
  python -m cluster up --config deploy/serve/two_gpus.yaml        a tower per GPU
  python -m cluster generate --prompt $'words: 2009\\n'             ask it something
  python -m cluster tune --input prompts.jsonl                    which confidence threshold suits them?
  python -m cluster status                                        is it well?
  python -m cluster down                                          stop it
"""
_UP_EXAMPLES = """examples:
  python -m cluster up
  python -m cluster up --set ingress.http_port=8080 --set ingress.grpc_port=50052
  python -m cluster up --set cell.placement=split --set cell.max_sequences=8
  python -m cluster up --config deploy/serve/local.yaml --set decode.mode=ar

Every setting, its default and its meaning: cluster/config.py. Ctrl-C stops the service.
"""
_DOWN_S = 30.0
_LONGEST = 2000  # characters of an error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Errors are one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ConfigError, InvalidRequest) as error:
        print(f"error: {one_line(str(error), _LONGEST)}", file=sys.stderr)
        return 2
    except TwoTowerError as error:
        print(f"error: {one_line(str(error), _LONGEST)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        print(f"error: unexpected {type(error).__name__}: {one_line(str(error))}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m cluster", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    up = commands.add_parser("up", help="start the service and stay", epilog=_UP_EXAMPLES, formatter_class=raw)
    up.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML, such as deploy/serve/local.yaml")
    up.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides", help="one setting")
    up.add_argument("--address", help="join a running Ray ('auto' finds it) instead of starting one on loopback")
    up.add_argument("--replace", action="store_true", help="with --address: end the application that is there")
    up.add_argument("--verbose", action="store_true", help="show the log lines of every process")
    up.set_defaults(run=_up)
    for name, run, text in (("status", _status, "say how it is"), ("down", _down, "stop it")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--http-port", type=port, metavar="PORT", help="which service, where there are several")
        command.set_defaults(run=run)
    generate = commands.add_parser("generate", help="send a prompt and show the answer", formatter_class=raw)
    add_generate_arguments(generate)
    generate.set_defaults(run=_generate)
    tune = commands.add_parser(
        "tune",
        help="find the confidence threshold for your own prompts",
        description=tune_command.DESCRIPTION,
        epilog=tune_command.EPILOG,
        formatter_class=raw,
    )
    tune_command.add_tune_arguments(tune)
    tune.set_defaults(run=tune_command.run)
    return parser


def _up(options: argparse.Namespace) -> int:
    from cluster.up import Up

    config = load_config(options.config, options.overrides)
    Up(config, options.address, options.verbose, options.replace).run()
    return 0


def _status(options: argparse.Namespace) -> int:
    from cluster import client

    _, state = run_state.the_one(options.http_port)
    ready = client.is_ready(state.http)
    rows = [("ready", "yes" if ready else "no"), ("pid", str(state.pid))]
    rows += [("HTTP", f"http://{state.http}"), ("gRPC", state.grpc), ("cells", str(state.cells))]
    if ready:
        info = client.model_info(state.grpc)
        rows += [("model", f"{info.model_name} ({info.checkpoint_layout}, {info.checkpoint_fingerprint})")]
        rows += [("modes", ", ".join(client.mode_names(info.modes)))]
        rows += [("max_sequence_length", str(info.max_sequence_length)), ("version", info.version)]
    for name, value in rows:
        print(f"{name:<20} {value}")
    return 0 if ready else 1


def _down(options: argparse.Namespace) -> int:
    _, state = run_state.the_one(options.http_port)
    if not _ends(state, signal.SIGTERM):
        raise TwoTowerError(f"the service (pid {state.pid}) has not ended within {_DOWN_S:g} s")
    print(f"stopped the service on http://{state.http} (pid {state.pid})")
    return 0


def _ends(state: RunState, number: int) -> bool:
    """Signals the very process that left the note, and waits for its end."""
    if state.is_alive():
        os.kill(state.pid, number)
    deadline = time.monotonic() + _DOWN_S
    while state.is_alive():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _generate(options: argparse.Namespace) -> int:
    from cluster import client

    request = request_of(options)
    address = options.address or run_state.grpc_address()
    try:
        client.generate(address, request, options.timeout, options.json)
    except client.Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 2 if refused.mistake else 1
    return 0
