"""Passes recorded once as a TorchScript program and replayed: the CPU's counterpart of a CUDA graph.

A pass of the demo's ten layers is some four hundred small operations; called from Python they take twice as long as in
a program that calls them one after the other. The program is made of the very operations an eager pass ran, in the
same order and with nothing fused, so its numbers are the same bits. It holds for any number of rows and pages: only the
width is fixed, and the form of the experts, which depends on how many tokens there are.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.config import ModelConfig
from twotower.engine.graphs import FixedStates
from twotower.engine.passes import EagerPasses, forward, padded
from twotower.model.cache import WASTE_PAGE, TowerCache
from twotower.model.moe import FEW_TOKENS
from twotower.model.pages import pages_for
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.model.transfer import on_device

logger = logging.getLogger(__name__)

OFTEN = 64  # uses of a form before it is recorded: a recording costs as much as some fifty passes
MOST_PROGRAMS = 16
_WARM_UPS = 3  # TorchScript watches the first runs and tidies its program after them

Program = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Form:
    """What a program is fixed to. `few`: no more than `FEW_TOKENS` tokens in all rows together."""

    width: int
    head: bool
    timed: bool
    few: bool


class RecordedPasses:
    """Passes over one cache. A form runs eagerly until it has come up `often` times, or has been prepared."""

    def __init__(self, tower: ContextTower | DenoiserTower, cache: TowerCache, often: int = OFTEN) -> None:
        self._tower, self._cache, self._often = tower, cache, often
        self._eager = EagerPasses(tower, cache)
        self._programs: dict[Form, Program] = {}
        self._uses: Counter[Form] = Counter()

    def run(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], t: Sequence[float] | None = None, head: bool = True
    ) -> Tensor:
        longest = max(len(ids) for ids in tokens)
        width = padded(longest)
        form = Form(width, head, t is not None, width * len(slots) <= FEW_TOKENS)
        program = self._programs.get(form) or self._recorded(form)
        if program is None:
            return self._eager.run(slots, tokens, t, head)
        cache = self._cache
        given_RX, t_R = self._given(slots, tokens, width), on_device(t or [], self._tower.device, torch.float32)
        out_RLX = program(given_RX, t_R, cache.conv, cache.ssm, cache.keys, cache.values)
        return out_RLX[:, :longest]

    def prepare(self, width: int) -> None:
        denoiser = not self._tower.causal
        for few in (True, False):
            for form in (Form(width, denoiser, denoiser, few), Form(1, True, False, few)):
                if form not in self._programs:
                    self._programs[form] = record(self._tower, form)

    def _recorded(self, form: Form) -> Program | None:
        self._uses[form] += 1
        if self._uses[form] < self._often or len(self._programs) >= MOST_PROGRAMS:
            return None
        return self._programs.setdefault(form, record(self._tower, form))

    def _given(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], width: int) -> Tensor:
        """A row each: tokens, slot, cached length, new length, pages."""
        starts = [self._cache.length(slot) for slot in slots]
        new = width if self._tower.causal else 0
        pages = max(pages_for(max(starts) + new), 1)
        rows = []
        for slot, start, ids in zip(slots, starts, tokens, strict=True):
            table = list(self._cache.pages_of(slot)[:pages])
            padding = [0] * (width - len(ids))
            rows.append([*ids, *padding, slot, start, len(ids), *table, *[0] * (pages - len(table))])
        return on_device(rows, self._tower.device)


class _Borrowed:
    """A cache's tensors as a program is given them. Holds no cache: a program keeps what it was recorded from."""

    def __init__(self, config: ModelConfig, tensors: Sequence[Tensor]) -> None:
        self.mamba_row, self.attention_row = config.layers_of("M").index, config.layers_of("*").index
        self.conv, self.ssm, self.keys, self.values = tensors


def plain_pass(tower: ContextTower | DenoiserTower, form: Form) -> Program:
    """What gets recorded."""

    def run(given_RX: Tensor, t_R: Tensor, conv: Tensor, ssm: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        tokens_RL, places_RX = given_RX[:, : form.width], given_RX[:, form.width :]
        memory = _Borrowed(tower.config, (conv, ssm, keys, values))
        states = FixedStates(memory, places_RX, form.width, updates=tower.causal)
        return forward(tower, tokens_RL, states, t_R if form.timed else None, form.head)

    return run


def record(tower: ContextTower | DenoiserTower, form: Form) -> Program:
    """Run a pass of this form over a cache of its own and keep what it did."""
    rows = max(1, min(2, FEW_TOKENS // form.width)) if form.few else max(2, FEW_TOKENS // form.width + 1)
    pages = pages_for(form.width) + 1
    cache = TowerCache(tower.config, rows, rows * pages, tower.device, tower.dtype)
    given = [[*range(form.width), row, 1, form.width, *[WASTE_PAGE] * pages] for row in range(rows)]
    t_R = torch.full((rows if form.timed else 0,), 0.5, device=tower.device)
    example = (on_device(given, tower.device), t_R, cache.conv, cache.ssm, cache.keys, cache.values)
    program = traced(plain_pass(tower, form), example)
    logger.debug("recorded a pass of %s", form)
    return program


def traced(run: Callable[..., Tensor], example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """What `run` does with tensors of these shapes, as a program."""
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated; and of constants, which are constant in this form
        program: Callable[..., Tensor] = torch.jit.trace(run, example, check_trace=False)
        for _ in range(_WARM_UPS):
            program(*example)
    return program
