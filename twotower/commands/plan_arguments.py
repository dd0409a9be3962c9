"""The flags of `plan`. Imports no torch."""

import argparse

from twotower.commands.parser import Parser, count, share
from twotower.exchange.settings import SSM_WIRE_DTYPES
from twotower.planner.devices import BLOCK, DEVICES, ROUTINGS, Assumed

PLAN = """Compute the cost of a checkpoint's passes on a device, what fits there, and how fast each mode can become.
This needs only the architecture and the device's published figures, neither weights nor a GPU. Times are lower
bounds: they count only what must be moved and computed."""
PLAN_EXAMPLES = """examples:
  the released model on an H200, 8192 cached tokens of each sequence:
    python -m twotower plan
  another device, prompts of your own length, tokens a step as `python -m cluster tune` measured them:
    python -m twotower plan --device h100 --context 2048 --tokens-per-step 3.3
  both towers on one GPU of 80 GB, with experts in 4 bits:
    python -m twotower plan --device h100 --experts int4
"""
_MOST_ROWS, _MOST_CONTEXT = 4096, 1 << 24


def add_plan_arguments(parser: Parser) -> None:
    """The flags of `plan`."""
    usual = Assumed()
    parser.add_argument(
        "--checkpoint",
        default="30b",
        metavar="DIR",
        help="a directory with a config.json, that file, `demo`, or `30b` for the released model (default: 30b)",
    )
    parser.add_argument("--device", default="h200", help=f"{' | '.join(DEVICES)} (default: h200)")
    parser.add_argument(
        "--rows", type=_counts, default=[1, 4, 16, 64, 256], metavar="N,N", help="sequences of a pass (1,4,16,64,256)"
    )
    parser.add_argument("--context", type=_context, default=8192, metavar="N", help="cached tokens per sequence (8192)")
    parser.add_argument(
        "--experts", default="stored", help="format of experts: stored | int8 | int4 (default: stored, bf16 or its own)"
    )
    parser.add_argument(
        "--expert-group", type=int, default=0, metavar="N", help="with int4, weights that share a scale (default: 32)"
    )
    group = parser.add_argument_group("assumed")
    group.add_argument(
        "--routing",
        choices=ROUTINGS,
        default=ROUTINGS[0],
        help="which experts a pass touches: uniform, the most on average; demo, as measured there and carried over "
        f"({ROUTINGS[0]})",
    )
    group.add_argument(
        "--tokens-per-step",
        type=_tokens,
        default=usual.tokens_per_step,
        metavar="N",
        help=f"of diffusion, measured by `tune` ({usual.tokens_per_step:g}: from the paper's 2.42 x)",
    )
    group.add_argument(
        "--tokens-per-round",
        type=_tokens,
        default=usual.tokens_per_round,
        metavar="N",
        help=f"of verified ({usual.tokens_per_round:g})",
    )
    group.add_argument(
        "--draft-steps", type=_tokens, default=usual.draft_steps, metavar="N", help=f"a round ({usual.draft_steps:g})"
    )
    group.add_argument(
        "--reached", type=_some, default=usual.reached, help=f"share of the bandwidth reached ({usual.reached:g})"
    )
    group.add_argument(
        "--kept-free", type=share, default=usual.kept_free, help=f"share of the memory kept free ({usual.kept_free:g})"
    )
    group.add_argument(
        "--ssm-wire-dtype",
        choices=SSM_WIRE_DTYPES,
        default=usual.ssm_wire_dtype,
        help=f"in which Mamba states are sent to a denoiser: {' | '.join(SSM_WIRE_DTYPES)} ({usual.ssm_wire_dtype})",
        metavar="DTYPE",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: bytes by part, seconds, rates")


def _counts(text: str) -> list[int]:
    numbers = [count(part) for part in text.split(",")]
    if max(numbers) > _MOST_ROWS:
        raise argparse.ArgumentTypeError(f"got {max(numbers)}, wanted at most {_MOST_ROWS}")
    return numbers


def _context(text: str) -> int:
    if (tokens := count(text)) > _MOST_CONTEXT:
        raise argparse.ArgumentTypeError(f"got {tokens}, wanted at most {_MOST_CONTEXT}")
    return tokens


def _tokens(text: str) -> float:
    """A number above 0, at most a block."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= BLOCK:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted more than 0 and at most {BLOCK}")
    return value


def _some(text: str) -> float:
    if not (value := share(text)):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted more than 0")
    return value
