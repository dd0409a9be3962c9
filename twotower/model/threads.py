"""How many compute threads a tower on the CPU should use."""

from twotower.config import ModelConfig

_SMALL_WIDTH = 256


def threads_for(config: ModelConfig, cores: int) -> int:
    """All `cores`, but one thread for a small model. A small model's operations take microseconds, and its threads wait
    for one another after each. On shared cores, `ar` on the demo with two threads gave a third of its tokens.
    """
    return 1 if config.hidden_size <= _SMALL_WIDTH else max(1, cores)
