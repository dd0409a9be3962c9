"""`python -m twotower`: generate text from a checkpoint in this process, measure a service, plan for a device, or
quantise a checkpoint's experts."""

import logging
import sys
from io import TextIOWrapper

from twotower.commands import main

if __name__ == "__main__":
    # The command itself reports an error, once and in one line.
    logging.getLogger("twotower").addHandler(logging.NullHandler())
    logging.getLogger("twotower").propagate = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))
