"""`python -m twotower plan`: what passes cost on a device, what fits there, and how fast each mode can become."""

import json
import sys
from argparse import Namespace

from twotower.commands.orders import directory_of
from twotower.config import ModelConfig
from twotower.expert_formats import ExpertFormat
from twotower.planner.ceilings import Planner
from twotower.planner.devices import Assumed, device_named
from twotower.planner.released import RELEASED
from twotower.planner.report import figures, text


def plan(options: Namespace) -> int:
    """Print the plan. Returns 0: a plan cannot fail in part. Raises CheckpointError or ConfigError."""
    config, form = _config(options.checkpoint), ExpertFormat.of(options.experts, options.expert_group)
    if form is not None:
        config = config.with_experts(form)
    planner = Planner(config, device_named(options.device), _assumed(options), options.routing)
    told = figures(planner, options.rows, options.context)
    if options.json:
        json.dump(told, sys.stdout, indent=1)
        print()
        return 0
    print(f"{options.checkpoint} on {options.device}")
    print(text(told, planner.device.source), end="")
    return 0


def _config(name: str) -> ModelConfig:
    if name == "30b":
        return RELEASED
    directory = directory_of(name)
    return ModelConfig.load(directory.parent if directory.name == "config.json" else directory)


def _assumed(options: Namespace) -> Assumed:
    return Assumed(
        options.tokens_per_step,
        options.tokens_per_round,
        options.draft_steps,
        options.reached,
        options.kept_free,
        options.ssm_wire_dtype,
    )
