"""A typed client of TwoTower Serve, blocking and with asyncio, over gRPC and HTTP. Needs neither torch nor Ray.

from twotower_client import Client

with Client("grpc://127.0.0.1:50051") as client:
    print(client.complete("words: 2009\\n", mode="verified", max_new_tokens=64).text)
    for event in client.stream("words: 2009\\n"):
        ...
"""

from twotower_client.answers import (
    Alternative,
    Answer,
    Block,
    Event,
    Finished,
    Likelihood,
    ModelInfo,
    Readiness,
    Round,
    Score,
    Step,
    Usage,
)
from twotower_client.asking import MODES, Floor, Message, Mode
from twotower_client.async_client import AsyncClient, AsyncStream
from twotower_client.client import Client, Stream
from twotower_client.errors import (
    Cancelled,
    DeadlineExceeded,
    FieldViolation,
    InternalError,
    InvalidRequest,
    NotFound,
    NumericalError,
    Overloaded,
    RateLimited,
    ServiceError,
    TlsMistake,
    Unauthenticated,
    Unavailable,
    UnexpectedAnswer,
)
from twotower_client.retrying import RetryPolicy
from twotower_client.target import KEY_VARIABLE, Tls

__version__ = "0.2.0"

__all__ = [
    "KEY_VARIABLE",
    "MODES",
    "Alternative",
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Block",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Event",
    "FieldViolation",
    "Finished",
    "Floor",
    "InternalError",
    "InvalidRequest",
    "Likelihood",
    "Message",
    "Mode",
    "ModelInfo",
    "NotFound",
    "NumericalError",
    "Overloaded",
    "RateLimited",
    "Readiness",
    "RetryPolicy",
    "Round",
    "Score",
    "ServiceError",
    "Step",
    "Stream",
    "Tls",
    "TlsMistake",
    "Unauthenticated",
    "Unavailable",
    "UnexpectedAnswer",
    "Usage",
]
