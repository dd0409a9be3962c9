"""`auto`: drafts while that is faster than letting the context tower write alone, by the present costs of passes.

The tokens are `ar`'s either way. If the request's floor allows `diffusion`, that mode decodes either the whole request
or none of it. So the tokens are always those of a mode that can be asked for by name.

Drafts that do not pay now may pay later, so a row tries one now and then. A try waits until its loss is two per cent of
the time since the last try. Passes with more rows than ever seen need no try: their cost is assumed to be low, so they
run and are measured.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TypeVar

from twotower.core import DecodingParams, Floor, Mode, Request
from twotower.engine.meter import Meter, Pass
from twotower.engine.modes.choosing import Costs, Signs, fastest, loss_s, paces

_WEIGHT = 0.1  # weight of the newest block in the mean over requests with such parameters; first blocks weigh more
_DRAFTS_WEIGHT = 0.03  # the same, where all draft: so the few last requests of a load say little about the next load
_OWN_WEIGHT = 0.25  # weight of the newest block in the mean over one request
_OWN_COUNT = 4  # a request counts the mean over others as so many blocks
_TELLING = 2  # only so many first drafts of a request count for others: a request with bad drafts has the most drafts
_MOST_KNOWN = 256  # sets of parameters that are remembered
_SPENT = 0.02  # share of the time for tries
_FIRST = 4  # tokens written alone for a first measurement
_TRIED_EVERY = 50  # one of so many requests is decoded the other way, unless that is far slower
_FAR_SLOWER = 0.5
_FASTER = 1.1  # how many times as fast another way must be for all requests of a kind to change
_CLEARLY_FASTER = 1.3  # the same for a single request: it then needs separate passes, for which all others wait
_CAUSAL = (Mode.AR, Mode.VERIFIED)
_Known = TypeVar("_Known")


@dataclass(slots=True)
class Blocks:
    """Running means over blocks: steps, tokens (of drafts, accepted tokens), and the share of committed blocks.
    `count`: the number of blocks, including an assumed first one.
    """

    steps: float
    tokens: float
    commits: float = 1.0
    count: int = 1

    def note(self, steps: float, tokens: float, least: float, commits: float = 1.0) -> None:
        """Add the newest block. It weighs as much as each block before it, but at least `least`."""
        self.count += 1
        weight = max(least, 1 / self.count)
        self.steps += weight * (steps - self.steps)
        self.tokens += weight * (tokens - self.tokens)
        self.commits += weight * (commits - self.commits)


@dataclass(slots=True)
class _Kind:
    """Requests with like drafts: the value of these drafts, the way these requests are decoded, and the seconds that a
    try may lose.
    """

    drafts: Blocks
    way: Mode = Mode.VERIFIED
    spare_s: float = 0.0


class Auto:
    """The common state of all `auto` requests of an engine. `apart`: the towers compute at the same time."""

    def __init__(self, meter: Meter, apart: bool) -> None:
        self._meter, self._apart = meter, apart
        self._kinds: dict[Hashable, _Kind] = {}
        self._diffused: dict[Hashable, Blocks] = {}
        self.rows = 1
        self._costs: dict[int, Costs | None] = {}  # by rows, in this tick
        self._begun = 0
        self._usual = Mode.DIFFUSION  # how requests begin, where their floor says nothing else

    def look(self, rows: int) -> None:
        """Called before a tick's choices with the number of sequences that share passes now."""
        self.rows = max(1, rows)
        self._costs.clear()

    def begin(self, request: Request) -> Mode:
        """`diffusion` or `verified`: how the request is decoded."""
        params = request.params
        if params.floor is Floor.LOSSLESS or request.committed:
            return Mode.VERIFIED
        self._begun += 1
        blocks, costs = self._diffused.get(_blocks(params)), self._costs_with(self.rows)
        if blocks is None or costs is None:
            return Mode.DIFFUSION if blocks is None else Mode.VERIFIED
        drafts = self.drafts(params)
        found = paces(costs, Signs(drafts.steps, drafts.tokens, blocks.steps, blocks.tokens, blocks.commits))
        pace = {Mode.DIFFUSION: found[Mode.DIFFUSION], Mode.VERIFIED: found[fastest(found, _CAUSAL)]}
        self._usual = fastest(pace, pace, self._usual, _CLEARLY_FASTER)
        other = Mode.VERIFIED if self._usual is Mode.DIFFUSION else Mode.DIFFUSION
        is_try = self._begun % _TRIED_EVERY == 0 and pace[other] > _FAR_SLOWER * pace[self._usual]
        return other if is_try else self._usual

    def diffused(self, params: DecodingParams, steps: int, tokens: int, last: bool = False) -> None:
        """A block of `diffusion` took so many steps and gave the answer so many tokens."""
        known = _known(self._diffused, _blocks(params), Blocks(steps, tokens))
        known.note(steps, tokens, _WEIGHT, int(not last))

    def drafted(self, params: DecodingParams, steps: int, accepted: float) -> None:
        """A draft took so many steps, and so many of its tokens were accepted."""
        kind = self._kind(params)
        kind.drafts.note(steps, accepted, _DRAFTS_WEIGHT if kind.way is Mode.VERIFIED else _WEIGHT)

    def drafts(self, params: DecodingParams) -> Blocks:
        """The drafting rule for requests like this one."""
        return self._kind(params).drafts

    def alone(self, params: DecodingParams, own: Blocks, size: int) -> int:
        """How many tokens, at most `size`, the context tower writes next for a request with such drafts; 0: the request
        drafts.
        """
        costs, single, kind = self._costs_with(self.rows), self._costs_with(1), self._kind(params)
        if costs is None or single is None:
            seen = (self._meter.seconds(each, self.rows) is not None for each in (Pass.STEP, Pass.READ))
            return min(_FIRST, size) if all(seen) else 0
        kind.way = fastest(paces(costs, _signs(kind.drafts)), _CAUSAL, kind.way, _FASTER)
        if fastest(paces(costs, _signs(own)), _CAUSAL, kind.way, _CLEARLY_FASTER) is Mode.VERIFIED:
            return 0
        if kind.spare_s < loss_s(single, costs, self.rows, _signs(own)):
            return size
        kind.spare_s = 0.0
        return 0

    def wrote(self, params: DecodingParams, tokens: int) -> None:
        """The context tower wrote so many tokens for one of the rows. That time counts for tries of the row's own kind
        only; otherwise kinds with cheap tries would use up the time of the others.
        """
        costs = self._costs_with(self.rows)
        if costs is not None:
            self._kind(params).spare_s += _SPENT * tokens * costs.token / self.rows

    def _kind(self, params: DecodingParams) -> _Kind:
        """Unknown drafts are assumed to be perfect, so the first requests draft."""
        return _known(self._kinds, _drafts(params), _Kind(Blocks(1, params.block_size - 1)))

    def _costs_with(self, rows: int) -> Costs | None:
        """None until each kind of pass has been seen. Computed at most once a tick."""
        if rows not in self._costs:
            self._costs[rows] = self._found(rows)
        return self._costs[rows]

    def _found(self, rows: int) -> Costs | None:
        step, read, token = (self._meter.seconds(kind, rows) for kind in Pass)
        if step is None or read is None or token is None:
            return None
        return Costs(step, read, token, self._apart and rows > 1)


class Weighed:
    """When one request drafts (`Drafts`), by measured time."""

    def __init__(self, auto: Auto, params: DecodingParams) -> None:
        self._auto, self._params = auto, params
        self._own: Blocks | None = None
        self._telling = _TELLING
        self._size = params.block_size  # width of the block: less near the answer's end

    def ended(self, steps: int, tokens: int) -> None:
        if not steps:
            self._auto.wrote(self._params, tokens)
            return
        if self._own is None:
            self._own = replace(self._auto.drafts(self._params), count=_OWN_COUNT)
        self._own.note(steps, tokens, _OWN_WEIGHT)
        # A block at an answer's end says little about other blocks, except if the answer is only this block.
        is_whole = self._size == self._params.block_size
        if self._telling and (is_whole or self._params.max_new_tokens <= self._params.block_size):
            self._telling -= 1
            self._auto.drafted(self._params, steps, self._of_a_whole_block(tokens))

    def _of_a_whole_block(self, tokens: int) -> float:
        """How many tokens of a whole drafted block would have been accepted, given these. A short draft that was
        accepted completely gives no upper end: assume no fewer than usual.
        """
        stands = tokens >= self._size - 1
        return max(tokens, self._auto.drafts(self._params).tokens) if stands else tokens

    def alone(self, room: int) -> int:
        known, size = self._own or self._auto.drafts(self._params), min(self._params.block_size, room)
        self._size = size
        # Beside other rows an answer's end is decoded like the rest: a pass for one row would cost all of them.
        tokens = min(known.tokens, size - 1) if self._auto.rows == 1 else known.tokens
        return self._auto.alone(self._params, Blocks(known.steps, tokens), size)


def _known(by_key: dict[Hashable, _Known], key: Hashable, new: _Known) -> _Known:
    """The value of the key, or `new` if there is none. If there are too many keys, the oldest is dropped."""
    if key not in by_key and len(by_key) >= _MOST_KNOWN:
        del by_key[next(iter(by_key))]
    return by_key.setdefault(key, new)


def _signs(drafts: Blocks) -> Signs:
    return Signs(drafts.steps, drafts.tokens)


def _blocks(params: DecodingParams) -> Hashable:
    threshold = round(params.confidence_threshold, 1)
    return params.block_size, params.steps_per_block, threshold, params.samples, params.steers


def _drafts(params: DecodingParams) -> Hashable:
    return params.block_size, params.draft_steps, round(params.draft_threshold, 1), params.samples, params.steers
