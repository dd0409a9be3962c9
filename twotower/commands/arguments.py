"""The flags of `python -m twotower`. Knows their spelling only; `twotower.validation` says which values are good."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from twotower import __version__
from twotower.commands.bench.arguments import DESCRIPTION, EPILOG, add_bench_arguments
from twotower.commands.parameter_flags import add_parameter_flags, add_telling_flags
from twotower.commands.parser import Parser, ids, number
from twotower.commands.plan_arguments import PLAN, PLAN_EXAMPLES, add_plan_arguments
from twotower.commands.quantize_arguments import QUANTIZE, QUANTIZE_EXAMPLES, add_quantize_arguments

EXAMPLES = """\
examples:
  one prompt, text on the terminal as blocks are committed:
    python -m twotower generate --checkpoint demo --prompt $'roman: 3376\\n' --max-new-tokens 32

  many prompts, one JSON object a line in and out, decoded together, order kept:
    echo '{"id": "a", "prompt": "words: 2009\\n", "mode": "ar"}' > prompts.jsonl
    python -m twotower generate --checkpoint demo --input prompts.jsonl --output answers.jsonl

exit status: 0 all done; 1 a failure, or lines of --input that were skipped or whose request failed;
2 nothing done, because of the input (with --strict one bad line is enough); 130 Ctrl-C
"""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Exits with code 2 and one line if flags are unknown, missing or contradictory."""
    parser = Parser(prog="python -m twotower", description="Two-tower diffusion language models.")
    parser.add_argument("--version", action="version", version=f"twotower {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate",
        help="generate text from a checkpoint, in this process",
        description="Generate text from a checkpoint, in this process: no service, no network.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_sources(generate)
    add_parameter_flags(generate.add_argument_group("decoding"))
    add_telling_flags(generate.add_argument_group("telling"))
    _add_running(generate)
    bench = commands.add_parser(
        "bench",
        help="put a load on a running service, and measure it",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_bench_arguments(bench)
    add_plan_arguments(
        commands.add_parser(
            "plan",
            help="what passes cost on a device, what fits, and how fast each mode can become",
            description=PLAN,
            epilog=PLAN_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    add_quantize_arguments(
        commands.add_parser(
            "quantize",
            help="make a checkpoint whose experts are held in 8 or 4 bits",
            description=QUANTIZE,
            epilog=QUANTIZE_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.command == "generate":
        _check_together(generate, options)
    return options


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="checkpoint directory, or `demo` for the one we ship"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the prompt as text")
    source.add_argument("--prompt-token-ids", type=ids, metavar="IDS", help="the prompt as token ids: 5,9,11")
    source.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="a file of JSON lines with `prompt` or `prompt_token_ids`, and `id`, `priority` or any flag",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the answers to --input go, as JSON lines")
    parser.add_argument("--strict", action="store_true", help="refuse the whole --input if one line is bad")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument(
        "--max-sequence-length",
        type=number,
        default=4096,
        metavar="N",
        help="prompt and new tokens of a request together, at most (default: 4096)",
    )
    group.add_argument("--dtype", default="float32", help="float32 | bfloat16 (default: float32)")
    group.add_argument(
        "--experts",
        default="stored",
        help="stored | int8 | int4: quantise experts while they are read; tokens change (default: stored)",
    )
    group.add_argument(
        "--expert-group", type=int, default=0, metavar="N", help="with int4, weights that share a scale (default: 32)"
    )
    group.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N (default: auto)")


def _check_together(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if (options.input is None) != (options.output is None):
        parser.error("--input FILE and --output FILE go together")
    if options.input is None and options.strict:
        parser.error("--strict goes with --input")
    if options.input is not None and options.json:
        parser.error("--json goes with one prompt; --output holds JSON lines anyway")
