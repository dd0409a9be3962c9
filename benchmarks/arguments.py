"""Types of the benchmarks' arguments: what was got and what was wanted, in one line."""

import argparse


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number from 1")
    return int(text)
