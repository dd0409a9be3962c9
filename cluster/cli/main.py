"""The command line, a function a command. `twotower.commands.ending` has its exit codes."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.cli import key as key_command
from cluster.cli.flag_types import host_and_port, port
from cluster.cli.generate_arguments import add_generate_arguments, request_of
from cluster.cli.tune import command as tune_command
from cluster.config import load_config
from cluster.ops import run_state
from cluster.ops.run_state import RunState
from twotower.commands.ending import BAD_INPUT, FAILED, OK, ended, fail
from twotower.commands.parser import Parser
from twotower.errors import ConfigError, TwoTowerError

_DESCRIPTION = "Serve a two-tower diffusion language model on this machine, and talk to it."
_EXAMPLES = """examples:
  python -m cluster up                                            the demo checkpoint on 127.0.0.1
  python -m cluster up --set model.checkpoint=/models/twotower    another checkpoint
  python -m cluster up --config deploy/serve/two_gpus.yaml        a tower per GPU
  python -m cluster generate --prompt $'words: 2009\\n'             send a prompt
  python -m cluster tune --input prompts.jsonl                    find the confidence threshold for these prompts
  python -m cluster status                                        is the service ready, and where?
  python -m cluster status --watch                                its cells and requests, once a second
  python -m cluster key team-a                                    draw a key for a client
  python -m cluster down                                          let running requests finish, then stop
"""
_UP_EXAMPLES = """examples:
  python -m cluster up
  python -m cluster up --set ingress.http_port=8080 --set ingress.grpc_port=50052
  python -m cluster up --set cell.placement=split --set cell.max_sequences=8
  python -m cluster up --config deploy/serve/local.yaml --set decode.mode=ar

Every setting, its default and its meaning: cluster/config.py. Ctrl-C stops the service.
"""
_STATUS = "say whether the service is ready, where it listens and what it serves"
_DOWN = "let the running requests finish, and stop the service"
_GENERATE = "A parameter that is not given takes the service's default. Meanings and limits: docs/parameters.md"
_END_S = 60.0  # seconds that `up` may take to end once no request runs
_AT_ONCE_S = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command."""
    return ended(lambda options: int(options.run(options)), _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m cluster", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    up = commands.add_parser(
        "up",
        help="start the service and stay",
        epilog=_UP_EXAMPLES,
        formatter_class=raw,
        verbose_too=", and the log lines of every process",
    )
    up.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML, such as deploy/serve/local.yaml")
    up.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        dest="overrides",
        help="one setting; may be given again",
    )
    up.add_argument("--address", help="join a running Ray ('auto' finds it) instead of starting one on loopback")
    up.add_argument("--replace", action="store_true", help="with --address: replace the application that runs there")
    up.set_defaults(run=_up)
    for name, run, text in (("status", _status, _STATUS), ("down", _down, _DOWN)):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--http-port", type=port, metavar="PORT", help="which service, if several of yours run")
        command.set_defaults(run=run)
        if run is _status:
            command.add_argument(
                "--address",
                type=host_and_port,
                metavar="HOST:PORT",
                help="HTTP address of any service: shows its cells, requests and events, as its /ops page does",
            )
            command.add_argument("--watch", action="store_true", help="show that once a second; Ctrl-C ends it")
    generate = commands.add_parser(
        "generate", help="send a prompt and show the answer", description=_GENERATE, formatter_class=raw
    )
    add_generate_arguments(generate)
    generate.set_defaults(run=_generate)
    key = commands.add_parser(
        "key",
        help="draw a key for a client",
        description=key_command.TEXT,
        epilog=key_command.EXAMPLES,
        formatter_class=raw,
    )
    key_command.add_key_arguments(key)
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
    from cluster.cli.up import Up

    config = load_config(options.config, options.overrides)
    if options.replace and options.address is None:
        raise ConfigError("--replace: wanted --address too, which names the Ray whose application to replace")
    Up(config, options.address, options.verbose, options.replace).run()
    return 0


def _status(options: argparse.Namespace) -> int:
    from cluster.cli import status

    return status.run(options)


def _down(options: argparse.Namespace) -> int:
    _, state = run_state.the_one(options.http_port)
    limit_s = state.drain_timeout_s + _END_S
    try:
        _end(state)
        if not state.ends_within(_AT_ONCE_S):
            print(
                f"waiting for the running requests, for {state.drain_timeout_s:g} s at most; Ctrl-C ends them now",
                file=sys.stderr,
                flush=True,
            )
            state.ends_within(limit_s)
    except KeyboardInterrupt:
        print("ending the running requests now; Ctrl-C once more stops this command only", file=sys.stderr)
        limit_s = _END_S
        _end(state)
        state.ends_within(limit_s)
    if state.is_alive():
        raise TwoTowerError(f"the service (pid {state.pid}) has not ended within {limit_s:g} s")
    print(f"stopped the service on {state.url} (pid {state.pid})")
    return 0


def _end(state: RunState) -> None:
    """Ends `up` as Ctrl-C in its terminal would: the first time after running requests, the second time at once."""
    if state.is_alive():
        os.kill(state.pid, signal.SIGTERM)


def _generate(options: argparse.Namespace) -> int:
    from cluster.cli import asking

    prompt, asked = request_of(options)
    address = options.address or run_state.grpc_address()
    try:
        asking.generate(address, prompt, {**asked, "timeout_s": options.timeout}, options.json)
    except asking.Refused as refused:
        return fail(BAD_INPUT if refused.mistake else FAILED, "", str(refused))
    return OK
