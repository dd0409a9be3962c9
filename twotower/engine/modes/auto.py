"""`auto`: drafts while that is faster than tokens that the context tower writes alone, by what passes cost just now.

The tokens are `ar`'s either way. Where the request's floor lets `diffusion` in, it is decoded by that from its begin to
its end, or not at all: then its tokens are those of a mode that can be asked for by name.

Drafts that are not worth their time now may be later, so a row tries one now and then. A try waits until the time that
it loses is two per cent of the time since the last one. What passes cost with more rows than were ever seen needs no
try: it is hoped to be little, so they are seen where that matters.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TypeVar

from twotower.core import DecodingParams, Floor, Mode, Request
from twotower.engine.meter import Meter, Pass
from twotower.engine.modes.choosing import Costs, Signs, fastest, loss_s, paces

_WEIGHT = 0.1  # of the newest block, in what is known of all requests with such parameters; of the first ones more
_DRAFTS_WEIGHT = 0.03  # where all draft: so the few requests that are left where a load ends say little of the next
_OWN_WEIGHT = 0.25  # in what is known of one request
_OWN_COUNT = 4  # blocks, as which a request takes what is known of others
_TELLING = 2  # drafts of a request, the first ones, that say something of others: one whose drafts are bad has the most
_MOST_KNOWN = 256  # parameters of which something is known
_SPENT = 0.02  # of the time, for tries
_FIRST = 4  # tokens alone, for a first look at what they cost
_TRIED_EVERY = 50  # requests, of which one is decoded the other way where that is not far slower
_FAR_SLOWER = 0.5
_FASTER = 1.1  # times as fast, for all requests of a kind to change their way
_CLEARLY_FASTER = 1.3  # for one of them to go its own: it has passes of its own then, for which all others wait
_CAUSAL = (Mode.AR, Mode.VERIFIED)
_Known = TypeVar("_Known")


@dataclass(slots=True)
class Blocks:
    """What blocks took and gave, running means: their steps, and their tokens (of drafts the accepted ones); how many
    were committed. `count`: of blocks, with one that was thought of before there were any."""

    steps: float
    tokens: float
    commits: float = 1.0
    count: int = 1

    def note(self, steps: float, tokens: float, least: float, commits: float = 1.0) -> None:
        """Of the newest block. It counts as much as each before it, and `least` so much."""
        self.count += 1
        weight = max(least, 1 / self.count)
        self.steps += weight * (steps - self.steps)
        self.tokens += weight * (tokens - self.tokens)
        self.commits += weight * (commits - self.commits)


@dataclass(slots=True)
class _Kind:
    """Requests with like drafts: what these are worth, how the requests go on, and seconds that a try may lose."""

    drafts: Blocks
    way: Mode = Mode.VERIFIED
    spare_s: float = 0.0


class Auto:
    """What all `auto` requests of an engine have in common. `apart`: the towers compute at the same time."""

    def __init__(self, meter: Meter, apart: bool) -> None:
        self._meter, self._apart = meter, apart
        self._kinds: dict[Hashable, _Kind] = {}
        self._diffused: dict[Hashable, Blocks] = {}
        self.rows = 1
        self._costs: dict[int, Costs | None] = {}  # by rows, in this tick
        self._begun = 0
        self._usual = Mode.DIFFUSION  # how requests begin, where their floor says nothing else

    def look(self, rows: int) -> None:
        """Before a tick's choices: so many sequences share passes now, and these cost what they cost."""
        self.rows = max(1, rows)
        self._costs.clear()

    def begin(self, request: Request) -> Mode:
        """`diffusion`, or `verified`: how it begins, and goes on."""
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
        """A draft took so many steps, and so much of it stands."""
        kind = self._kind(params)
        kind.drafts.note(steps, accepted, _DRAFTS_WEIGHT if kind.way is Mode.VERIFIED else _WEIGHT)

    def drafts(self, params: DecodingParams) -> Blocks:
        """Of requests like this one."""
        return self._kind(params).drafts

    def alone(self, params: DecodingParams, own: Blocks, size: int) -> int:
        """How many tokens the context tower writes next, of `size` that it may, for a request with such drafts; 0: it
        drafts."""
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
        """The context tower wrote so many for one of the rows. Its time pays for tries of its own kind: else those that
        lose little would leave nothing to the others."""
        costs = self._costs_with(self.rows)
        if costs is not None:
            self._kind(params).spare_s += _SPENT * tokens * costs.token / self.rows

    def _kind(self, params: DecodingParams) -> _Kind:
        """Drafts that are new are thought as good as can be: so the first requests draft."""
        return _known(self._kinds, _drafts(params), _Kind(Blocks(1, params.block_size - 1)))

    def _costs_with(self, rows: int) -> Costs | None:
        """None until each kind of pass has been seen. Found once a tick, where anybody asks."""
        if rows not in self._costs:
            self._costs[rows] = self._found(rows)
        return self._costs[rows]

    def _found(self, rows: int) -> Costs | None:
        step, read, token = (self._meter.seconds(kind, rows) for kind in Pass)
        if step is None or read is None or token is None:
            return None
        return Costs(step, read, token, self._apart and rows > 1)


class Weighed:
    """When one request drafts (`Drafts`): by the clock."""

    def __init__(self, auto: Auto, params: DecodingParams) -> None:
        self._auto, self._params = auto, params
        self._own: Blocks | None = None
        self._telling = _TELLING
        self._size = params.block_size  # of the block: less where the answer's end is near

    def ended(self, steps: int, tokens: int) -> None:
        if not steps:
            self._auto.wrote(self._params, tokens)
            return
        if self._own is None:
            self._own = replace(self._auto.drafts(self._params), count=_OWN_COUNT)
        self._own.note(steps, tokens, _OWN_WEIGHT)
        # A block at an answer's end says little of others, but where an answer is one such block it says all there is.
        is_whole = self._size == self._params.block_size
        if self._telling and (is_whole or self._params.max_new_tokens <= self._params.block_size):
            self._telling -= 1
            self._auto.drafted(self._params, steps, self._of_a_whole_block(tokens))

    def _of_a_whole_block(self, tokens: int) -> float:
        """How many drafted tokens would stand, of so many that do. Of one that was cut short and stands as a whole
        nobody knows: no fewer than usually."""
        stands = tokens >= self._size - 1
        return max(tokens, self._auto.drafts(self._params).tokens) if stands else tokens

    def alone(self, room: int) -> int:
        known, size = self._own or self._auto.drafts(self._params), min(self._params.block_size, room)
        self._size = size
        # Beside others the end of an answer goes as the rest of it: a pass for one row would cost them all.
        tokens = min(known.tokens, size - 1) if self._auto.rows == 1 else known.tokens
        return self._auto.alone(self._params, Blocks(known.steps, tokens), size)


def _known(by_key: dict[Hashable, _Known], key: Hashable, new: _Known) -> _Known:
    """What is known of the key, or `new`, where nothing was. Of too many keys the oldest goes."""
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
