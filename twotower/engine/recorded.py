"""Passes recorded once as a TorchScript program and replayed: the CPU's counterpart of a CUDA graph.

A pass of the demo's thirteen layers is some seven hundred small operations. From Python they take half as long again as
in a program that calls them one after the other. The program has the operations of an eager pass, in the same order and
without fusion, so its numbers have the same bits. It works for any number of rows and pages. Only the width is fixed,
and the form of the experts, which depends on the number of tokens.
"""

import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.jit import TracerWarning  # type: ignore[attr-defined]
from torch.jit._fuser import optimized_execution

from twotower.config import MASK_TOKEN_ID, ModelConfig
from twotower.decoding.guesses import likeliest, positions_at_once
from twotower.decoding.unmasking import Blocks, StepParams, decided
from twotower.engine.fixed_states import FixedStates
from twotower.engine.passes import USUAL_WIDTH, EagerPasses, Want, decided_apart, forward, logits_of, padded
from twotower.model.cache import TowerCache
from twotower.model.moe import FEW_TOKENS
from twotower.model.pages import PAGE_TOKENS, WASTE_PAGE, pages_for
from twotower.model.rescan import KeptScan, KeptScans
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.model.transfer import on_device

logger = logging.getLogger(__name__)

OFTEN = 64  # uses of a form before it is recorded: a recording costs as much as some fifty passes
_MOST_PROGRAMS = 16
_RECORDING = threading.Lock()

Program = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Form:
    """The fixed properties of a program. `few`: all rows together have at most `FEW_TOKENS` tokens. `decides`: a
    denoiser's pass includes a greedy step's decision, some thirty small operations that would cost half as much again
    separately. `keeps_scans`: a context tower's pass returns its scans after the hidden states, and changes no Mamba
    state.
    """

    width: int
    want: Want
    timed: bool
    few: bool
    decides: bool = False
    keeps_scans: bool = False


class RecordedPasses:
    """Passes over one cache. A form runs eagerly until it has come up `often` times, or has been prepared."""

    def __init__(self, tower: ContextTower | DenoiserTower, cache: TowerCache, often: int = OFTEN) -> None:
        self._tower, self._cache, self._often = tower, cache, often
        self._eager = EagerPasses(tower, cache)
        self._programs: dict[Form, Program] = {}
        self._uses: Counter[Form] = Counter()

    def run(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        t: Sequence[float] | None = None,
        want: Want = Want.LOGITS,
    ) -> Tensor:
        longest = max(len(ids) for ids in tokens)
        width = padded(longest)
        form = Form(width, want, t is not None, width * len(slots) <= FEW_TOKENS)
        program = self._programs.get(form) or self._recorded(form)
        if program is None:
            return self._eager.run(slots, tokens, t, want)
        [out] = program(*self._given(slots, tokens, t or [], width))
        return out[:, :longest]

    def verify(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> tuple[Tensor, KeptScans | None]:
        width = padded(max(len(ids) for ids in tokens))
        form = Form(width, Want.HIDDEN, False, width * len(slots) <= FEW_TOKENS, keeps_scans=True)
        program = self._programs.get(form) or self._recorded(form)
        if program is None:
            return self._eager.verify(slots, tokens)
        hidden_RLD, *scans = program(*self._given(slots, tokens, [], width))
        return hidden_RLD, KeptScans(*scans) if scans else None

    def step(self, slots: Sequence[int], blocks: Blocks) -> Tensor:
        width = padded(blocks.width)
        form = Form(width, Want.HIDDEN, True, width * len(slots) <= FEW_TOKENS, decides=True)
        places = blocks.places(width)
        recordable = blocks.plain and len(places) <= positions_at_once(self._tower.config.vocab_size)
        program = (self._programs.get(form) or self._recorded(form)) if recordable else None
        if program is None:
            return decided_apart(self, self._tower, slots, blocks)
        given, device = self._given(slots, blocks.tokens, blocks.mask_fractions, width), self._tower.device
        [outcome] = program(*given, on_device(places, device), blocks.given(device, width))
        return outcome

    def prepare(self, width: int) -> None:
        for few in (True, False):
            block = Form(width, Want.HIDDEN, True, few)
            read = Form(width, Want.STATES, False, few)
            kept = replace(read, want=Want.HIDDEN)
            usual = [read, kept] if self._tower.causal else [block, replace(block, decides=True)]
            if self._tower.causal and width == USUAL_WIDTH:
                usual.append(replace(kept, keeps_scans=True))  # drafts, which are no longer
            for form in (*usual, Form(1, Want.LOGITS, False, few)):
                if form not in self._programs:
                    self._programs[form] = record(self._tower, form, self._cache.page_tokens)

    def _recorded(self, form: Form) -> Program | None:
        self._uses[form] += 1
        if self._uses[form] < self._often or len(self._programs) >= _MOST_PROGRAMS:
            return None
        return self._programs.setdefault(form, record(self._tower, form, self._cache.page_tokens))

    def _given(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], t: Sequence[float], width: int
    ) -> tuple[Tensor, ...]:
        """A program's inputs: for each row tokens, slot, cached length, new length and pages; t; the cache."""
        cache, device = self._cache, self._tower.device
        starts = [cache.length(slot) for slot in slots]
        new = width if self._tower.causal else 0
        pages = max(cache.room.pages_for(max(starts) + new), 1)
        rows = []
        for slot, start, ids in zip(slots, starts, tokens, strict=True):
            table = list(cache.pages_of(slot)[:pages])
            padding = [0] * (width - len(ids))
            rows.append([*ids, *padding, slot, start, len(ids), *table, *[0] * (pages - len(table))])
        t_R = on_device(t, device, torch.float32)
        return on_device(rows, device), t_R, cache.conv, cache.ssm, cache.keys, cache.values


class _Borrowed:
    """A cache's tensors as inputs of a program. Holds no cache, because a program keeps the objects it was recorded
    from.
    """

    def __init__(self, config: ModelConfig, tensors: Sequence[Tensor], page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.mamba_row, self.attention_row = config.layers_of("M").index, config.layers_of("*").index
        self.conv, self.ssm, self.keys, self.values = tensors


def plain_pass(tower: ContextTower | DenoiserTower, form: Form, page_tokens: int = PAGE_TOKENS) -> Program:
    """What gets recorded: a pass over caches with pages of so many positions."""

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        given_RX, t_R, *tensors = given
        tokens_RL, places_RX = given_RX[:, : form.width], given_RX[:, form.width :]
        memory = _Borrowed(tower.config, tensors, page_tokens)
        kept: list[KeptScan] | None = [] if form.keeps_scans else None
        states = FixedStates(memory, places_RX, form.width, tower.causal, kept)
        out = forward(tower, tokens_RL, states, t_R if form.timed else None, form.want)
        return out, *(KeptScans.of(kept) or ())

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        *of_pass, places_P, blocks_RX = given
        [hidden_RLD] = run(*of_pass)
        guesses_P4 = likeliest(logits_of(tower.logits, hidden_RLD, places_P), MASK_TOKEN_ID)
        return (decided(guesses_P4, places_P, blocks_RX, form.width),)

    return step if form.decides else run


def record(tower: ContextTower | DenoiserTower, form: Form, page_tokens: int = PAGE_TOKENS) -> Program:
    """Run a pass of this form over a cache of its own and keep what it did."""
    device, width = tower.device, form.width
    rows = max(1, min(2, FEW_TOKENS // width)) if form.few else max(2, FEW_TOKENS // width + 1)
    pages = pages_for(width, page_tokens) + 1
    cache = TowerCache(tower.config, rows, rows * pages, device, tower.dtype, page_tokens=page_tokens)
    tokens = [place % tower.config.vocab_size for place in range(width)]
    given = [[*tokens, row, 1, width, *[WASTE_PAGE] * pages] for row in range(rows)]
    t_R = torch.full((rows if form.timed else 0,), 0.5, device=device)
    example: tuple[Tensor, ...] = (on_device(given, device), t_R, cache.conv, cache.ssm, cache.keys, cache.values)
    if form.decides:
        blocks = Blocks([[0] * width] * rows, [[True] * width] * rows, [StepParams(0.5, 1)] * rows)
        example = (*example, on_device(blocks.places(width), device), blocks.given(device, width))
    with torch.inference_mode():
        program = _traced(plain_pass(tower, form, page_tokens), example)
        program(*example)  # the first run builds what the others use
    logger.debug("recorded a pass of %s", form)
    return program


def _traced(run: Program, example: Sequence[Tensor]) -> Program:
    """The operations of `run` over `example`, as a program that is freed with its last reference.

    `torch.jit.trace` enters its functions into a table that lives as long as the process. TorchScript's optimiser keeps
    further copies: 25 MB for one of the demo's programs. Here the owner keeps the graph, which is simplified once and
    runs without further optimisation.
    """
    # Warning filters belong to the whole process: two threads at once would restore each other's.
    with _RECORDING, warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)  # about constants, which are constant in this form
        graph, _ = torch._C._create_graph_by_tracing(run, list(example), lambda _: "", True, False)
    torch._C._jit_pass_constant_propagation(graph)
    torch._C._jit_pass_cse(graph)  # two thirds of a trace are repeated constants
    torch._C._jit_pass_peephole(graph, disable_shape_peepholes=True)  # the shapes are the example's
    unplaced = graph.create("prim::Constant", [], 1)
    for node in graph.nodes():
        node.copyMetadata(unplaced)  # instead of the text of the Python stack that made the node
    function = torch._C._create_function_from_graph("recorded_pass", graph)

    def replay(*given: Tensor) -> tuple[Tensor, ...]:
        with optimized_execution(False):
            result: tuple[Tensor, ...] = function(*given)
            return result

    return replay
