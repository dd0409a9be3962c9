"""What a router knows of the checkpoint: limits, tokenizer, names. Reads headers and the tokenizer, never weights."""

from dataclasses import dataclass

import twotower
from cluster.config import ServiceConfig
from cluster.served_paths import checkpoint_directory
from twotower.core import DecodingParams, Mode
from twotower.decoding.tokenizer import Tokenizer, load_tokenizer
from twotower.errors import ConfigError
from twotower.model.checkpoint import Checkpoint
from twotower.validation import ModelLimits


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The running checkpoint as clients see it."""

    name: str
    limits: ModelLimits
    tokenizer: Tokenizer | None
    layout: str
    fingerprint: str
    version: str = twotower.__version__


def load_served_model(config: ServiceConfig) -> ServedModel:
    """Raises CheckpointError for a damaged directory, ConfigError where its modes and the configured ones disagree."""
    directory = checkpoint_directory(config.model.checkpoint)
    checkpoint = Checkpoint.open(directory)
    modes = tuple(m for m in checkpoint.modes if m is Mode.AR or config.cell.placement != "ar_only")
    limits = ModelLimits(
        vocab_size=checkpoint.config.vocab_size,
        max_sequence_length=config.model.max_sequence_length,
        modes=modes,
        defaults=_defaults(config, modes),
    )
    return ServedModel(
        name=config.model.name or ("demo" if config.model.checkpoint == "demo" else directory.name),
        limits=limits,
        tokenizer=load_tokenizer(directory),
        layout=str(checkpoint.layout),
        fingerprint=checkpoint.fingerprint,
    )


def _defaults(config: ServiceConfig, modes: tuple[Mode, ...]) -> DecodingParams:
    values = config.decode.model_dump(exclude={"mode"})
    preferred = Mode(config.decode.mode) if config.decode.mode else modes[0]
    if preferred not in modes:
        raise ConfigError(f"decode.mode: got {preferred}, wanted a mode this cell can serve ({', '.join(modes)})")
    return DecodingParams(mode=preferred, **values)
