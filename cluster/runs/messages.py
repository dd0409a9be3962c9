"""What a cell and a router say to each other: a router nothing but that it lives, and who waits in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.runs.signs import CellSign
from twotower.core import (
    PARAMETERS,
    AnyRequest,
    BlockEvent,
    FailureEvent,
    Mode,
    Request,
    RoundEvent,
    ScoreEvent,
    StepEvent,
    ToldEvent,
)
from twotower.transport.codec import Codec
from twotower.transport.handshake import Address

CELL_SILENCE_S = 3.0  # then a router goes on elsewhere
UNTOLD = frozenset(
    "mode max_new_tokens block_size steps_per_block confidence_threshold temperature top_k top_p seed stop_token_ids "
    "ignore_eos draft_steps draft_threshold floor".split()
)
ROUTER_SILENCE_S = 5.0  # then a cell gives up what the router asked of it: the lease


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where one call's events go: a router, and the call's number there."""

    address: Address
    call: int


@dataclass(frozen=True, slots=True)
class Beat:
    """A cell lives: which one, from what checkpoint, what it serves now, and how full it is. Scores are served where
    `ar` is. `sign`: what operators see of it; a cell of an older version says none. One of a newer version may serve
    `modes` that this one does not know; `serves` are those that it does."""

    cell: str
    fingerprint: str
    modes: tuple[str, ...]
    running: int
    waiting: int
    slots: int
    sign: CellSign | None = None

    @property
    def serves(self) -> tuple[Mode, ...]:
        return tuple(mode for mode in Mode if mode in self.modes)


@dataclass(frozen=True, slots=True)
class Wishes:
    """Where a call should not go: not at all to `avoid`, while there is another cell, and rather not to `full`.

    `load`: the requests that a cell holds, where this router has heard of them in the last seconds.

    The last argument of every call through Serve: cluster.runs.routing obeys in the router's own process. To the cell,
    which ignores it, it travels empty: of a thousand cells it would be as long as a prompt.
    """

    avoid: frozenset[str] = frozenset()
    full: frozenset[str] = frozenset()
    load: Mapping[str, int] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type["Wishes"], tuple[()]]:
        return Wishes, ()


NO_WISHES = Wishes()


@dataclass(frozen=True, slots=True)
class Waits:
    """A router lives: how many requests wait in it for a turn on the cells, and for how long the first of them."""

    requests: int
    longest_s: float


@dataclass(frozen=True, slots=True)
class Placed:
    """A cell has taken the call: which one, and with what checkpoint. Comes before all events.

    `vocabulary`: the same where token ids mean the same; a cell of an older version says none. `knows`: the parameters
    of requests that the cell's version has; one of a version that says none has those of `UNTOLD`.
    """

    call: int
    cell: str
    fingerprint: str
    vocabulary: str = ""
    knows: tuple[str, ...] = ()

    def unknown(self, request: AnyRequest) -> list[str]:
        """What the request asks for, and this cell would leave out in silence."""
        if not isinstance(request, Request):
            return []
        asked = (name for name, one in PARAMETERS.items() if getattr(request.params, name) != one.default)
        known = self.knows or UNTOLD
        return [name for name in asked if name not in known]


@dataclass(frozen=True, slots=True)
class Block:
    call: int
    event: BlockEvent


@dataclass(frozen=True, slots=True)
class Scored:
    call: int
    event: ScoreEvent


@dataclass(frozen=True, slots=True)
class Stepped:
    call: int
    event: StepEvent


@dataclass(frozen=True, slots=True)
class Verdict:
    call: int
    event: RoundEvent


@dataclass(frozen=True, slots=True)
class Failed:
    """Nothing follows."""

    call: int
    event: FailureEvent


OfCall = Placed | Block | Scored | Stepped | Verdict | Failed
Message = Beat | Waits | OfCall
CODEC: Codec[Message] = Codec(Beat, Waits, Placed, Block, Scored, Stepped, Verdict, Failed)


def about(call: int, event: ToldEvent | FailureEvent) -> OfCall:
    """An event on its way to the call."""
    match event:
        case BlockEvent():
            return Block(call, event)
        case ScoreEvent():
            return Scored(call, event)
        case StepEvent():
            return Stepped(call, event)
        case RoundEvent():
            return Verdict(call, event)
        case FailureEvent():
            return Failed(call, event)
