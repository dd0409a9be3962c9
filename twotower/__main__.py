"""`python -m twotower`, and `twotower` if the wheel is installed. It generates text from a checkpoint in this process,
measures a service, plans for a device, or quantises a checkpoint's experts.
"""

import logging
import sys
from io import TextIOWrapper

from twotower.commands import main


def run() -> int:
    """The command of this process."""
    # What goes wrong is said once, in one line, by the command itself.
    logging.getLogger("twotower").addHandler(logging.NullHandler())
    logging.getLogger("twotower").propagate = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())
