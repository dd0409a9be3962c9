"""`auto`: drafts while that is faster than tokens that the context tower writes alone, by what passes cost just now.

The tokens are `ar`'s either way. Where the request's floor lets `diffusion` in, it is decoded by that from its begin to
its end, or not at all: then its tokens are those of a mode that can be asked for by name.

Drafts that are not worth their time now may be later, so a row tries one now and then. A try waits until the time that
it loses is two per cent of the time since the last one. What passes cost with more rows than were ever seen needs no
try: it is hoped to be little, so they are seen where that matters.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from twotower.core import DecodingParams, Floor, Mode, Request
from twotower.engine.meter import Meter, Pass
from twotower.engine.modes.choosing import Costs, Signs, fastest, loss_s, paces

_WEIGHT = 0.1  # of the newest block, in what is known of all requests with such parameters
_OWN_WEIGHT = 0.25  # in what is known of one request
_MOST_KNOWN = 256  # parameters of which something is known
_SPENT = 0.02  # of the time, for tries
_FIRST = 4  # tokens alone, for a first look at what they cost
_TRIED_EVERY = 50  # requests, of which one is decoded the other way where that is not far slower
_FAR_SLOWER = 0.5
_CAUSAL = (Mode.AR, Mode.VERIFIED)


@dataclass(slots=True)
class Blocks:
    """What blocks took and gave, running means: their steps, and their tokens (of drafts the accepted ones); how many
    were committed."""

    steps: float
    tokens: float
    commits: float = 1.0

    def note(self, steps: float, tokens: float, weight: float, commits: float = 1.0) -> None:
        self.steps += weight * (steps - self.steps)
        self.tokens += weight * (tokens - self.tokens)
        self.commits += weight * (commits - self.commits)


class _Known:
    """Means by parameters, those that were new last."""

    def __init__(self) -> None:
        self._by_params: dict[Hashable, Blocks] = {}

    def get(self, params: Hashable) -> Blocks | None:
        return self._by_params.get(params)

    def note(self, params: Hashable, steps: int, tokens: int, before: Blocks, commits: int = 1) -> None:
        """`before`: what is thought of such blocks before there are any."""
        if params not in self._by_params and len(self._by_params) >= _MOST_KNOWN:
            del self._by_params[next(iter(self._by_params))]
        self._by_params.setdefault(params, before).note(steps, tokens, _WEIGHT, commits)


class Auto:
    """What all `auto` requests of an engine have in common. `apart`: the towers compute at the same time."""

    def __init__(self, meter: Meter, apart: bool) -> None:
        self._meter, self._apart = meter, apart
        self._drafts, self._diffused = _Known(), _Known()
        self.rows = 1
        # With the rows that are there now, and with one; none until each kind of pass has been seen.
        self._costs: Costs | None = None
        self._single: Costs | None = None
        self._begun = 0
        self._usual = Mode.DIFFUSION  # how requests begin, where their floor says nothing else
        self._spare_s: dict[Hashable, float] = {}  # of the device, that a try may lose, by the kind of drafts

    def look(self, rows: int) -> None:
        """Before a tick's choices: so many sequences share passes now, and these cost what they cost."""
        self.rows = max(1, rows)
        self._costs, self._single = self._costs_of(self.rows), self._costs_of(1)

    def begin(self, request: Request) -> Mode:
        """`diffusion`, or `verified`: how it begins, and goes on."""
        params = request.params
        if params.floor is Floor.LOSSLESS or request.committed:
            return Mode.VERIFIED
        self._begun += 1
        blocks, costs = self._diffused.get(_blocks(params)), self._costs
        if blocks is None or costs is None:
            return Mode.DIFFUSION if blocks is None else Mode.VERIFIED
        drafts = self.drafts(params)
        found = paces(costs, Signs(drafts.steps, drafts.tokens, blocks.steps, blocks.tokens, blocks.commits))
        pace = {Mode.DIFFUSION: found[Mode.DIFFUSION], Mode.VERIFIED: found[fastest(found, _CAUSAL)]}
        self._usual = fastest(pace, pace, self._usual)
        other = Mode.VERIFIED if self._usual is Mode.DIFFUSION else Mode.DIFFUSION
        is_try = self._begun % _TRIED_EVERY == 0 and pace[other] > _FAR_SLOWER * pace[self._usual]
        return other if is_try else self._usual

    def diffused(self, params: DecodingParams, steps: int, tokens: int, last: bool = False) -> None:
        """A block of `diffusion` took so many steps and gave the answer so many tokens."""
        self._diffused.note(_blocks(params), steps, tokens, Blocks(steps, tokens), int(not last))

    def drafted(self, params: DecodingParams, steps: int, accepted: int) -> None:
        """A draft took so many steps, and so much of it stands."""
        self._drafts.note(_drafts(params), steps, accepted, self.drafts(params))

    def drafts(self, params: DecodingParams) -> Blocks:
        """Of requests like this one. Where there were none, as good as can be: so the first ones draft."""
        return self._drafts.get(_drafts(params)) or Blocks(1, params.block_size - 1)

    def alone(self, params: DecodingParams, blocks: Blocks, size: int, now: Mode | None = None) -> int:
        """How many tokens the context tower writes next, of `size` that it may, for a request with such drafts; 0: it
        drafts. `now`: how its last block was decoded."""
        costs, single = self._costs, self._single
        if costs is None or single is None:
            seen = (self._meter.seconds(kind, self.rows) is not None for kind in (Pass.STEP, Pass.READ))
            return min(_FIRST, size) if all(seen) else 0
        signs = Signs(blocks.steps, blocks.tokens)
        if fastest(paces(costs, signs), _CAUSAL, now) is Mode.VERIFIED:
            return 0
        if self._spare_s.get(_drafts(params), 0.0) < loss_s(single, costs, self.rows, signs):
            return size
        self._spare_s[_drafts(params)] = 0.0
        return 0

    def wrote(self, params: DecodingParams, tokens: int) -> None:
        """The context tower wrote so many for one of the rows. Its time pays for tries of its own kind: else those that
        lose little would leave nothing to the others."""
        if self._costs is None:
            return
        kind = _drafts(params)
        if kind not in self._spare_s and len(self._spare_s) >= _MOST_KNOWN:
            del self._spare_s[next(iter(self._spare_s))]
        self._spare_s[kind] = self._spare_s.get(kind, 0.0) + _SPENT * tokens * self._costs.token / self.rows

    def _costs_of(self, rows: int) -> Costs | None:
        step, read, token = (self._meter.seconds(kind, rows) for kind in Pass)
        if step is None or read is None or token is None:
            return None
        return Costs(step, read, token, self._apart and rows > 1)


class Weighed:
    """When one request drafts (`Drafts`): by the clock."""

    def __init__(self, auto: Auto, params: DecodingParams) -> None:
        self._auto, self._params = auto, params
        self._own: Blocks | None = None
        self._now: Mode | None = None

    def ended(self, steps: int, tokens: int) -> None:
        before, self._now = self._now, Mode.VERIFIED if steps else Mode.AR
        if not steps:
            self._auto.wrote(self._params, tokens)
            return
        if self._own is None:
            known = self._auto.drafts(self._params)
            self._own = Blocks(known.steps, known.tokens)
        self._own.note(steps, tokens, _OWN_WEIGHT)
        if before is not Mode.AR:  # behind tokens alone an answer's end is near, and a draft worth less than others
            self._auto.drafted(self._params, steps, tokens)

    def alone(self, room: int) -> int:
        known, size = self._own or self._auto.drafts(self._params), min(self._params.block_size, room)
        # Beside others the end of an answer goes as the rest of it: a pass for one row would cost them all.
        tokens = min(known.tokens, size - 1) if self._auto.rows == 1 else known.tokens
        return self._auto.alone(self._params, Blocks(known.steps, tokens), size, self._now)


def _blocks(params: DecodingParams) -> Hashable:
    return params.block_size, params.steps_per_block, round(params.confidence_threshold, 1), params.samples


def _drafts(params: DecodingParams) -> Hashable:
    return params.block_size, params.draft_steps, round(params.draft_threshold, 1), params.samples, params.steers
