"""The command line: arguments in, files and terminal out. The only part of the library that prints; `ending`
has its exit codes."""

from argparse import Namespace
from collections.abc import Sequence

from twotower.commands.arguments import parse
from twotower.commands.ending import FAILED, OK, ended
from twotower.errors import ConfigError

PROG = "python -m twotower"


def main(arguments: Sequence[str]) -> int:
    """Runs one command. Returns the exit code; argparse itself exits for --help, --version and bad flags."""
    return ended(lambda options: FAILED if _run(options) else OK, parse(arguments), f"{PROG}: ")


def _run(options: Namespace) -> int:
    """How much failed."""
    if options.command == "bench":
        try:
            from twotower.commands.bench.command import bench
        except ModuleNotFoundError as error:
            if error.name != "twotower_client":
                raise
            raise ConfigError("bench asks through the package twotower-client, which is not installed") from None
        return bench(options)
    if options.command == "plan":
        from twotower.commands.plan import plan

        return plan(options)
    if options.command == "quantize":
        from twotower.commands.quantize import quantize

        return quantize(options)
    # Brings torch, which takes seconds; --help and a mistyped flag need not wait for it.
    from twotower.commands.generate import generate

    return generate(options).num_failed
