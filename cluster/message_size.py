"""Whether the longest allowed request fits through Serve to a cell."""

from ray.serve._private.constants import RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH as LIMIT

from cluster.config import ServiceConfig
from twotower.errors import ConfigError

VARIABLE = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
BYTES_PER_TOKEN = 5  # bytes of a pickled id: one for its kind, four for the number
BESIDE_THE_PROMPT = 2**20  # stop tokens, parameters, and Serve's own bytes


def largest_message(max_sequence_length: int) -> int:
    """Bytes of the longest request on its way from a router to a cell."""
    return BYTES_PER_TOKEN * max_sequence_length + BESIDE_THE_PROMPT


def check_message_size(config: ServiceConfig) -> None:
    """Raises ConfigError if Serve would break off the longest request. An environment variable sets Serve's limit."""
    length = config.engine.max_sequence_length
    wanted = largest_message(length)
    if wanted > LIMIT:
        raise ConfigError(
            f"model.max_sequence_length: got {length}, for which a request may take {wanted} bytes between router and "
            f"cell, wanted at most the {LIMIT} of {VARIABLE}, which is set before Ray starts"
        )
