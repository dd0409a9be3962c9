"""A router's knowledge of the checkpoint: limits, tokenizer, names. Reads headers and the tokenizer, never weights."""

from dataclasses import dataclass

import twotower
from cluster.config import ServiceConfig
from cluster.served_paths import checkpoint_directory
from twotower.core import DecodingParams, Mode
from twotower.errors import ConfigError
from twotower.model.checkpoint import Checkpoint
from twotower.text.chat_template import ChatTemplate, template_of
from twotower.text.grammars import Grammars
from twotower.text.tokenizer import Tokenizer, load_tokenizer
from twotower.validation import ModelLimits, check_values


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The running checkpoint as clients see it."""

    name: str
    limits: ModelLimits
    tokenizer: Tokenizer | None
    layout: str
    fingerprint: str
    vocabulary: str
    chat_template: ChatTemplate | None = None
    version: str = twotower.__version__
    grammars: Grammars | None = None


def load_served_model(config: ServiceConfig) -> ServedModel:
    """Raises CheckpointError for a damaged directory or a broken chat template, and ConfigError if its modes and the
    configured ones disagree.
    """
    directory = checkpoint_directory(config.model.checkpoint)
    checkpoint = Checkpoint.open(directory, config.engine.expert_format)
    modes = tuple(m for m in checkpoint.modes if m is Mode.AR or config.cell.placement != "ar_only")
    limits = ModelLimits(
        vocab_size=checkpoint.config.vocab_size,
        max_sequence_length=config.engine.max_sequence_length,
        modes=modes,
        defaults=_defaults(config, modes),
    )
    tokenizer = load_tokenizer(directory)
    grammars = Grammars(directory, checkpoint.config.vocab_size, checkpoint.config.eos_token_id)
    grammars.prepare()
    return ServedModel(
        name=served_name(config),
        limits=limits,
        tokenizer=tokenizer,
        chat_template=template_of(tokenizer, directory, config.model.chat_template),
        layout=str(checkpoint.layout),
        fingerprint=checkpoint.fingerprint,
        vocabulary=checkpoint.vocabulary,
        grammars=grammars,
    )


def served_name(config: ServiceConfig) -> str:
    """The model's name for clients and metrics."""
    model = config.model
    return model.name or ("demo" if model.checkpoint == "demo" else checkpoint_directory(model.checkpoint).name)


def _defaults(config: ServiceConfig, modes: tuple[Mode, ...]) -> DecodingParams:
    """Raises ConfigError. The configuration has been checked except against the checkpoint's modes."""
    values = check_values(config.decode.given)
    mode = values.setdefault("mode", modes[0])
    if mode not in modes:
        raise ConfigError(f"decode.mode: got {mode}, wanted a mode this cell can serve ({', '.join(modes)})")
    return DecodingParams(**values)
