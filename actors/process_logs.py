"""Sends a process's log lines to its stderr, which Ray keeps and forwards to the process that started the service."""

import logging
import os
import sys
from pathlib import Path

_OURS = ("cluster", "actors", "twotower")
_CHECKOUT = Path(__file__).resolve().parent.parent


def log_to_stderr(level: int = logging.INFO) -> None:
    """Call once in our processes; further calls change nothing. Logs where the process's code came from."""
    if logging.getLogger(_OURS[0]).handlers:
        return
    for name in _OURS:
        logger = logging.getLogger(name)
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    logging.getLogger(__name__).info("process %d runs the code in %s", os.getpid(), _CHECKOUT)
