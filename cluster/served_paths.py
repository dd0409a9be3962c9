"""Where a configured checkpoint lies, and whether one lies there at all; cheap, without torch."""

from pathlib import Path

import twotower
from twotower.config import ModelConfig
from twotower.errors import CheckpointError


def checkpoint_directory(name: str) -> Path:
    """The directory of a configured checkpoint; `demo` is the one shipped with the library."""
    if name == "demo":
        return Path(twotower.__file__).parent / "demo" / "checkpoint"
    return Path(name).expanduser().absolute()


def check_directory(name: str) -> None:
    """Raises CheckpointError unless there is a directory with a config.json that can be served."""
    directory = checkpoint_directory(name)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    ModelConfig.load(directory)


def example_prompt(name: str) -> str | list[int]:
    """Something to try a checkpoint with: text where it has a tokenizer. The demo's prompts end with a line break."""
    if name == "demo":
        return "words: 2009\n"
    has_text = (checkpoint_directory(name) / "tokenizer.json").exists()
    return "The two towers of" if has_text else [5, 9, 11]
