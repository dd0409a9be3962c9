"""How a command of ours ends: with an exit code, and one line on stderr where it failed.

Exit codes: 0 done, 1 a run that failed or lines that were skipped, 2 input that cannot be served as it is, 130 Ctrl-C.
An error that nobody expected is one line too; `--verbose` puts its traceback before the line.
"""

import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable

from twotower.errors import CheckpointError, ConfigError, InvalidRequest, TwoTowerError
from twotower.showing import one_line

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_LONGEST = 2000  # characters of an error


def ended(run: Callable[[Namespace], int], options: Namespace, prefix: str = "") -> int:
    """Runs a command that was parsed by `Parser`. `prefix` begins its error lines: whose errors they are."""
    try:
        code = run(options)
        _flush()
        return code
    except (InvalidRequest, CheckpointError, ConfigError) as error:
        return fail(BAD_INPUT, prefix, str(error))
    except TwoTowerError as error:
        return fail(FAILED, prefix, str(error))
    except KeyboardInterrupt:
        return fail(INTERRUPTED, prefix, "interrupted")
    except BrokenPipeError:
        _drop_output()  # whoever read our output has enough of it
        return FAILED
    except Exception as error:
        if options.verbose:
            traceback.print_exc()
        hint = "" if options.verbose else " (--verbose shows where)"
        return fail(FAILED, prefix, f"unexpected {type(error).__name__}: {one_line(str(error))}{hint}")


def _flush() -> None:
    """Now, because a failure at the interpreter's end would be nobody's. Raises OSError."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        _drop_output()
        raise


def _drop_output() -> None:
    """So that the interpreter does not try to flush it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(code: int, prefix: str, message: str) -> int:
    """Says why on stderr. Returns the code."""
    print(f"{prefix}error: {one_line(message, _LONGEST)}", file=sys.stderr)
    return code
