"""The flags of `quantize`. Imports no torch."""

from pathlib import Path

from twotower.commands.parser import Parser, count
from twotower.expert_formats import GROUPS, USUAL_GROUP

QUANTIZE = """Quantise the routed experts of a checkpoint in the released layout to 8 or 4 bits. Experts are 93 % of the
released model's weights. All other weights stay as they are: router, shared experts, attention, Mamba, time MLPs,
embeddings, heads. Only weights are quantised: a pass unpacks them and multiplies in the model's dtype."""
QUANTIZE_EXAMPLES = f"""formats:
  int8  a byte a weight, one fp32 scale an output channel: half of bfloat16's bytes; tokens hardly change
  int4  half a byte a weight, one bf16 scale for each --group weights ({USUAL_GROUP}: 4.5 bits in all): 28 % of the
        bytes. Smaller groups lose less and take more (16: 5 bits, 64: 4.25, 128: 4.125). The group has to divide
        hidden_size and moe_intermediate_size: the demo's 128 and 48 take 16, the released model's 2688 and 1856 at
        most 64.
  What a format costs in quality is measured on the demo: `python -m benchmarks.quantised`.

examples:
  python -m twotower quantize DIR --experts int4 --output DIR-int4
  python -m twotower generate --checkpoint DIR-int4 --prompt 'Hello'
  python -m twotower plan --device h100 --experts int4                     what fits then, and what a pass costs

A run that was cut short leaves OUTPUT.part, and the same command continues it. OUTPUT appears once it is complete.
A service can also quantise the experts at each start, while it reads the checkpoint: `model.experts: int4`.
Other loaders refuse the result: its model_type and the shapes of its matrices are not the released code's.
"""


def add_quantize_arguments(parser: Parser) -> None:
    """The flags of `quantize`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a directory in the released layout, or `demo`")
    parser.add_argument("--experts", required=True, choices=("int8", "int4"), help="the format; see below")
    parser.add_argument(
        "--group",
        type=count,
        default=None,
        metavar="N",
        help=f"of int4, weights that share a scale: {', '.join(map(str, GROUPS))} (default: {USUAL_GROUP})",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a directory that does not exist yet")
    parser.add_argument("--device", default="auto", help="computing device: auto | cpu | cuda | cuda:N (default: auto)")
