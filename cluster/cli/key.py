"""`key`: draws a key for a client, and prints its entry for the file of keys."""

import argparse
import sys

from pydantic import ValidationError

from cluster.runs.keys import KeyEntry, hash_of, new_key
from twotower.errors import ConfigError
from twotower_client import KEY_VARIABLE

TEXT = f"""Draw a key for a client. The key goes to standard error, once: nothing keeps it. The entry for the file of
keys goes to standard output; it has the key's hash only. Our own commands send the key
that is in the variable {KEY_VARIABLE}."""
EXAMPLES = """examples:
  python -m cluster key team-a                                   an entry without limits
  (echo keys:; python -m cluster key team-a) > keys.yaml         a new file
  python -m cluster key team-b --concurrent-requests 8 --tokens-per-minute 60000 >> keys.yaml
  python -m cluster up --set ingress.keys_file=$PWD/keys.yaml

A running service sees a changed file within a second or two.
"""


def add_key_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="what logs and metrics call it: letters, digits, . _ -")
    for name, text in (
        ("concurrent_requests", "requests under way at a time"),
        ("tokens_per_minute", "tokens of prompts and answers"),
        ("priority_from", "the lowest priority number it may ask for; lower goes first"),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Raises ConfigError for an invalid name or limit."""
    key = new_key()
    given = {name: getattr(options, name, None) for name in KeyEntry.model_fields} | {"sha256": hash_of(key)}
    try:
        entry = KeyEntry.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigError("; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())) from None
    print(entry.written(), end="")
    print(f"the key of {options.name}, shown this once: {key}", file=sys.stderr)
    return 0
