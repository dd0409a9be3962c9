"""How many tokens per second bare passes allow, computed before any engine runs.

Costs by rows per pass: `D(r)` a denoiser step `[r,16]`, `C(r)` a commit `[r,16]`, `A(r)` an AR step `[r,1]`, `P(r)` a
prompt pass over r prompts. A request brings N tokens, S denoiser steps, K commits (one less than its blocks, because
the last one is not read) and one prompt. `R` requests are always under way, each with one row in at most one pass at a
time.

`ar`, one tower: all rows step together, so R requests take `P(R) + (N-1)·A(R)`: the prompt pass gives the first token.

`diffusion`, two towers on two cores: let every denoiser pass have `d` rows and every commit `k` rows. Then requests per
second are at most the least of

    d / (S·D(d))                                 the denoiser computes all the time
    k / (K·C(k) + P(k))                          the context tower computes all the time
    R / (S·D(d) + K·C(k) + P(k))                 Little's law: a row is in one pass at a time, R rows are there

and the ceiling is the greatest such least over d and k up to R. At R = 1 it is the third: the towers take turns. From
R = 2 on they overlap, and the busier one bounds.

No engine reaches these bounds. They leave out exchange, scheduling, and decisions whose time is not in the costs. They
leave out a row's wait for another one to share its pass. And they assume two cores that do not slow each other down.

A tower that has waited for the other one starts cold. `turns_ceiling` takes the passes that follow a pause at their
cost after one: every commit, and the first step of every block. At concurrency 1 in `split` placement no engine can do
better.

`simple_ratio` is diffusion over AR at concurrency 1: `16/(c·(16/τ + 1))` with c = D(1)/A(1) and τ = N/S. It takes a
commit to cost as much as a step, knows no prompts, and counts as many commits as blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

BLOCK = 16


class Costs:
    """Seconds of one kind of pass by rows; between measured numbers of rows, straight lines."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._points = sorted(seconds.items())

    def __call__(self, rows: int) -> float:
        low = max((p for p in self._points if p[0] <= rows), default=self._points[0])
        high = min((p for p in self._points if p[0] >= rows), default=self._points[-1])
        if high[0] == low[0]:
            return low[1]
        return low[1] + (high[1] - low[1]) * (rows - low[0]) / (high[0] - low[0])


@dataclass(frozen=True, slots=True)
class PassCosts:
    """All that the ceilings are made of."""

    denoise: Costs
    commit: Costs
    ar: Costs
    prompt: Costs

    @property
    def c(self) -> float:
        return self.denoise(1) / self.ar(1)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks of the towers on average."""

    tokens: float
    steps: float
    commits: float

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Tokens per second, and what bounds them."""

    tokens_per_s: float
    bound: str
    rows: int
    commit_rows: int = 0


def ar_ceiling(costs: PassCosts, tokens: float, concurrency: int) -> Ceiling:
    seconds = costs.prompt(concurrency) + (tokens - 1) * costs.ar(concurrency)
    return Ceiling(concurrency * tokens / seconds, "context tower", concurrency)


def diffusion_ceiling(costs: PassCosts, demand: Demand, concurrency: int) -> Ceiling:
    best = Ceiling(0.0, "", 0)
    for d in range(1, concurrency + 1):
        for k in range(1, concurrency + 1):
            denoiser_s = demand.steps * costs.denoise(d)
            context_s = demand.commits * costs.commit(k) + costs.prompt(k)
            bounds = {
                "denoiser tower": d / denoiser_s,
                "context tower": k / context_s,
                "rows": concurrency / (denoiser_s + context_s),
            }
            bound = min(bounds, key=lambda name: bounds[name])
            tokens_per_s = demand.tokens * bounds[bound]
            if tokens_per_s > best.tokens_per_s:
                best = Ceiling(tokens_per_s, "towers in turn" if concurrency == 1 else bound, d, k)
    return best


def turns_ceiling(costs: PassCosts, rested: PassCosts, demand: Demand) -> float:
    """Tokens per second of diffusion at concurrency 1, passes after a pause taken as such."""
    blocks = demand.commits + 1
    steps_s = (demand.steps - blocks) * costs.denoise(1) + blocks * rested.denoise(1)
    return demand.tokens / (steps_s + demand.commits * rested.commit(1) + costs.prompt(1))


def simple_ratio(costs: PassCosts, tokens_per_step: float) -> float:
    """Diffusion over AR at concurrency 1 at most, every block committed, a commit as dear as a step."""
    return BLOCK / (costs.c * (BLOCK / tokens_per_step + 1))
