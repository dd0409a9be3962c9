"""The messages between cells and routers. A router sends only its beat and its waiting requests."""

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

CELL_SILENCE_S = 3.0  # then a router resumes its requests elsewhere
UNTOLD = frozenset(
    "mode max_new_tokens block_size steps_per_block confidence_threshold temperature top_k top_p seed stop_token_ids "
    "ignore_eos draft_steps draft_threshold floor".split()
)
ROUTER_SILENCE_S = 5.0  # then a cell drops the router's requests: the lease


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where one call's events go: a router, and the call's number there."""

    address: Address
    call: int


@dataclass(frozen=True, slots=True)
class Beat:
    """A cell's beat: its name, its checkpoint, its present modes, and how full it is. A cell with `ar` serves scores.
    `sign`: its state for operators; None from an older version. A newer version may serve `modes` that this version
    does not know; `serves` are the known ones.
    """

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
    """Where a call should not go: not to `avoid` while there is another cell, and preferably not to `full`.

    `load`: the requests that each cell holds, if this router has heard from it in the last seconds.

    The last argument of every call through Serve; cluster.runs.routing uses it in the router's own process. It is sent
    to the cell empty, which ignores it: with a thousand cells it would be as long as a prompt.
    """

    avoid: frozenset[str] = frozenset()
    full: frozenset[str] = frozenset()
    load: Mapping[str, int] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type["Wishes"], tuple[()]]:
        return Wishes, ()


NO_WISHES = Wishes()


@dataclass(frozen=True, slots=True)
class Waits:
    """A router's beat: how many requests wait in it for a turn on the cells, and how long the first has waited."""

    requests: int
    longest_s: float


@dataclass(frozen=True, slots=True)
class Placed:
    """A cell has taken the call: its name and checkpoint. Precedes all events.

    `vocabulary`: equal if token ids mean the same; empty from an older version. `knows`: the request parameters of the
    cell's version; a version that sends none has those of `UNTOLD`.
    """

    call: int
    cell: str
    fingerprint: str
    vocabulary: str = ""
    knows: tuple[str, ...] = ()

    def unknown(self, request: AnyRequest) -> list[str]:
        """The request's fields that this cell would silently ignore."""
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
    """An event for the call."""
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
