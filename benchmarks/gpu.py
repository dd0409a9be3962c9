"""Checks and times on a GPU: same numbers as the CPU, full-size passes against the memory roofline, two processes.

    python -m benchmarks.gpu --output benchmarks/results/gpu_<gpu>_<date>.md # everything; within 8 minutes on an H200
    python -m benchmarks.gpu --sections passes --batches 1,16                # one part of it
    python -m benchmarks.gpu --tiny                                          # all of it on a CPU; no time counts

parity    The golden checkpoints in fp32 and bf16, with the chosen kernels and with plain torch. Compared with the CPU
          in fp32: logits, states, and the released code's tokens in every mode.
passes    Two towers of the 30B-A3B's shapes side by side (random weights, made on the device: 2 × 59 GiB of bf16).
          Denoiser step, commit and AR step at each batch size, eagerly and as a CUDA graph, compared. The report has
          experts and bytes of a pass, the time for these bytes alone, peak memory, and where the host waits.
pages     One attention layer over a cache with 1k, 8k and 32k positions a row: pages read in place against pages that
          are gathered. Times, and the largest difference.
exchange  Two processes on the one device over the `distributed` exchange, gloo staged through pinned memory. Times,
          every byte checked, either process killed, a replacement under the next epoch.

Exit status 1 if a section broke or a number was wrong (in bf16: not finite); the report's end lists the faults. The
NCCL data group is not here, because it needs two GPUs. Library only: needs neither Ray nor gRPC.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu_parts import exchange, pages, parity, passes
from benchmarks.gpu_parts.report import Report
from benchmarks.gpu_parts.site import Site
from twotower.model.transfer import current

SECTIONS: dict[str, Callable[[Site, Report], None]] = {
    "parity": parity.run,
    "passes": passes.run,
    "pages": pages.run,
    "exchange": exchange.run,
}


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    try:
        site = Site.of(options.device, options.tiny, options.batches)
    except (ValueError, RuntimeError) as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    if site.device.type == "cpu":
        torch.set_num_threads(1)
    report = Report(site, " ".join(["python -m benchmarks.gpu", *given]), options.output)
    with current(site.device):  # marks of time and streams that name no device belong to the current one
        for name in options.sections:
            _run(name, site, report)
    report.close()
    if options.output is not None:
        print(f"report in {options.output}", file=sys.stderr)
    for fault in report.faults:
        print(f"gpu: {fault}", file=sys.stderr)
    return 1 if report.faults else 0


def _run(name: str, site: Site, report: Report) -> None:
    """A section that breaks is said so in the report, and the next one still runs."""
    try:
        SECTIONS[name](site, report)
    except Exception as error:
        report.add(f"## {name} BROKE\n\n`{type(error).__name__}: {error}`")
        report.fault(f"section {name} broke: {type(error).__name__}: {error}")
    finally:
        if site.device.type == "cuda":
            torch.cuda.empty_cache()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ",".join(SECTIONS)
    add("--sections", type=_sections, default=tuple(SECTIONS), metavar="A,B", help=f"of {names} (all)")
    add("--tiny", action="store_true", help="a tiny model, on the CPU unless --device says otherwise")
    add("--device", default="auto", help="cuda, cuda:N or cpu (cuda; with --tiny cpu)")
    add("--batches", type=_counts, metavar="N,M", help="rows of a pass (1,4,16,64; with --tiny 1,3)")
    add("--output", type=Path, metavar="FILE.md", help="write the report there, anew after every part")
    return parser


def _sections(text: str) -> tuple[str, ...]:
    chosen = text.split(",")
    if set(chosen) - set(SECTIONS):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted some of {','.join(SECTIONS)}")
    return tuple(name for name in SECTIONS if name in chosen)


def _counts(text: str) -> tuple[int, ...]:
    if any(not word.isdecimal() or int(word) < 1 for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted whole numbers from 1")
    return tuple(int(word) for word in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
