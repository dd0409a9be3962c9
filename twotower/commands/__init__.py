"""The command line: arguments in, files and terminal out, exit codes. The only part of the library that prints.

Exit codes: 0 done, 1 a run failed or lines were skipped, 2 the input cannot be served, 130 Ctrl-C. A failure is one
line on stderr, without a traceback.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence

from twotower.commands.arguments import parse
from twotower.errors import CheckpointError, ConfigError, InvalidRequest, TwoTowerError

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
PROG = "python -m twotower"


def main(arguments: Sequence[str]) -> int:
    """Run one command. Returns the process's exit code; argparse itself exits for --help, --version and bad flags."""
    options = parse(arguments)
    try:
        return FAILED if _run(options) else OK
    except (InvalidRequest, CheckpointError, ConfigError) as error:
        return _fail(BAD_INPUT, str(error))
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted")
    except BrokenPipeError:
        # The reader of our output has closed it; the interpreter must not try to flush it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except TwoTowerError as error:
        return _fail(FAILED, str(error))
    except Exception as error:
        return _fail(FAILED, f"unexpected {type(error).__name__}: {error}")


def _run(options: Namespace) -> int:
    """The number of failures."""
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
    # Imports torch, which takes seconds; --help and a mistyped flag need not wait for it.
    from twotower.commands.generate import generate

    return generate(options).num_failed


def _fail(code: int, message: str) -> int:
    print(f"{PROG}: error: {' '.join(message.split())}", file=sys.stderr)
    return code
