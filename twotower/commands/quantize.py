"""`python -m twotower quantize`: a checkpoint with experts in 8 or 4 bits."""

from argparse import Namespace

from twotower.commands.orders import directory_of
from twotower.engine.in_process import pick_device
from twotower.expert_formats import ExpertFormat
from twotower.model.quantising import Quantising, quantise_checkpoint


def quantize(options: Namespace) -> int:
    """Write the directory. Returns 0: the directory is never left incomplete. Raises CheckpointError or ConfigError."""
    form = ExpertFormat.of(options.experts, options.group or 0)
    assert form is not None
    device = pick_device(options.device)
    work = Quantising.of(directory_of(options.checkpoint), form, options.output)
    quantise_checkpoint(work, device, progress=True)
    share = work.after / work.before
    print(
        f"{options.output}: {len(work.matrices)} matrices of experts in {form}; {work.after / 1e9:.2f} GB of "
        f"{work.before / 1e9:.2f} ({100 * share:.0f} %)"
    )
    return 0
