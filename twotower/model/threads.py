"""How many compute threads a tower on the CPU is worth."""

from twotower.config import ModelConfig

_SMALL_WIDTH = 256


def threads_for(config: ModelConfig, cores: int) -> int:
    """All `cores`, but one thread for a small model. Its operations take microseconds, and its threads wait for one
    another after each. On cores that others use too, `ar` on the demo with two threads gave a third of its tokens."""
    return 1 if config.hidden_size <= _SMALL_WIDTH else max(1, cores)
