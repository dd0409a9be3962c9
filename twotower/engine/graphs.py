"""Passes of fixed shape: one upload, then nothing the host has to do; on a GPU captured at start and replayed.

A pass of a 52-layer tower is some four thousand launches, which cost the host more than the GPU needs for a few rows.
Rows and pages are rounded up to powers of two, so that few shapes occur; rows nobody asked for read and write a scratch
slot. `prepare` captures single tokens, blocks and drafts of up to the released size, for every number of rows and pages
that the cache allows. Everything else runs eagerly: wider rows, and many rows of very long sequences. Nothing is
captured while serving. On a CPU the same passes run without capture, which is how they are tested; a capture has not
been seen yet.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twotower.decoding.unmasking import Blocks
from twotower.engine.fixed_states import FixedStates
from twotower.engine.passes import MAX_POSITIONS, USUAL_WIDTH, EagerPasses, Want, decided_apart, forward, padded
from twotower.model import mamba
from twotower.model.attention import Attention
from twotower.model.cache import TowerCache
from twotower.model.in_pages import readable_in_place
from twotower.model.pages import WASTE_PAGE, pages_for
from twotower.model.rescan import Keeping, KeptScans
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.model.transfer import on_device

logger = logging.getLogger(__name__)

_FEWEST_SEEN = 64  # positions that the table of a captured pass has pages for, at least
# Rows times positions that a captured pass gathers. They stay in the graphs' memory, 256 MiB a layer at the 30B's
# shape. A larger pass takes so long that its launches do not matter. A pass that reads pages in place has no bound.
MOST_SEEN = 1 << 18


@dataclass(frozen=True, slots=True)
class PassShape:
    """What a captured pass is fixed to. `timed`: it is given t. `keeps_scans`: as `Passes.verify` wants it."""

    rows: int
    width: int
    pages: int
    want: Want
    timed: bool = False
    keeps_scans: bool = False


class CaptureMemory:
    """The memory of a tower's captures, which run one after the other. They share one stream: torch's allocator gives a
    free block of a pool only to the stream that used it. So a second stream would take memory of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        # Of its own: the one that torch would take belongs to whichever device captured first.
        self.stream = torch.cuda.Stream(device)


class FixedPass:
    """One shape's forward. Its inputs, its output `out` and its `scans` stay at their addresses: use them before the
    next `run`."""

    def __init__(
        self,
        tower: ContextTower | DenoiserTower,
        cache: TowerCache,
        shape: PassShape,
        scratch: int,
        out: Tensor,
        scans: KeptScans | None = None,
    ) -> None:
        self._tower, self._cache, self.shape, self._out, self.scans = tower, cache, shape, out, scans
        self._idle = [0] * shape.width + [scratch, 0, 1] + [WASTE_PAGE] * shape.pages
        self._given_RX = on_device([self._idle] * shape.rows, tower.device)
        self._t_R = torch.ones(shape.rows, device=tower.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        # The graph reads this mask for good, so it must not leave the function's cache of masks.
        self._kept = mamba._future(min(tower.config.chunk_size, shape.width), tower.device)

    def capture(self, memory: CaptureMemory) -> None:
        """Record the forward. What runs meanwhile are the idle rows: a warm-up must not extend anybody's state."""
        stream = memory.stream
        stream.wait_stream(torch.cuda.current_stream(self._tower.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward()
        torch.cuda.current_stream(self._tower.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (a link's) may use CUDA meanwhile.
        with torch.cuda.graph(self._graph, pool=memory.pool, stream=stream, capture_error_mode="thread_local"):
            self._forward()

    def run(self, rows: Sequence[Sequence[int]], t: Sequence[float]) -> Tensor:
        """`rows`: tokens, slot, start, length and pages of each. Output of these rows [R,…]."""
        idle = self.shape.rows - len(rows)
        self._given_RX.copy_(on_device([*rows, *[self._idle] * idle], self._tower.device))
        if self.shape.timed:
            self._t_R.copy_(on_device([*t, *[1.0] * idle], self._tower.device))
        if self._graph is not None:
            self._graph.replay()
        else:
            self._forward()
        return self._out[: len(rows)]

    def _forward(self) -> None:
        width, tower = self.shape.width, self._tower
        tokens_RL, given_RX = self._given_RX.split([width, self._given_RX.shape[1] - width], dim=1)
        kept = None if self.scans is None else Keeping(self.scans)
        states = FixedStates(self._cache, given_RX, width, tower.causal, kept)
        self._out.copy_(forward(tower, tokens_RL, states, self._t_R if self.shape.timed else None, self.shape.want))


class FixedPasses:
    """A tower's passes over a cache, a FixedPass for each shape that was captured, or on a CPU has occurred.

    All shapes write their output to the same memory: a large vocabulary's logits for each of them would fill a GPU. So
    they do with the scans of drafts.

    `scratch` is a slot of the cache that no sequence uses (a denoiser's is only read: any slot will do). `graphs` is
    the switch: without it, and on a CPU, passes run as they are. `longest`: positions of the longest sequence, where
    that is less than the whole cache.
    """

    def __init__(
        self,
        tower: ContextTower | DenoiserTower,
        cache: TowerCache,
        scratch: int,
        graphs: bool = True,
        longest: int | None = None,
    ) -> None:
        self._tower, self._cache, self._scratch, self._longest = tower, cache, scratch, longest
        self._passes: dict[PassShape, FixedPass] = {}
        self._outputs: dict[bool, Tensor] = {}
        self._scans: KeptScans | None = None
        self._eager = EagerPasses(tower, cache)
        self._memory = CaptureMemory(tower.device) if graphs and tower.device.type == "cuda" else None

    def run(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        t: Sequence[float] | None = None,
        want: Want = Want.LOGITS,
    ) -> Tensor:
        longest = max(len(ids) for ids in tokens)
        fixed = self._pass(self._shape(slots, longest, t is not None, want)) if longest <= USUAL_WIDTH else None
        if fixed is None:
            return self._eager.run(slots, tokens, t, want)
        return fixed.run(self._rows(slots, tokens, fixed.shape), t or [])[:, :longest]

    def verify(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> tuple[Tensor, KeptScans | None]:
        """Always of the usual width: a draft of one token alone is rare."""
        longest = max(len(ids) for ids in tokens)
        shape = replace(self._shape(slots, USUAL_WIDTH, False, Want.HIDDEN), keeps_scans=True)
        fixed = self._pass(shape) if longest <= USUAL_WIDTH else None
        if fixed is None:
            return self._eager.verify(slots, tokens)
        hidden_RLD = fixed.run(self._rows(slots, tokens, shape), [])[:, :longest]
        return hidden_RLD, None if fixed.scans is None else fixed.scans.first(len(slots))

    def _rows(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], shape: PassShape) -> list[list[int]]:
        return [
            [
                *[*ids, *[0] * (shape.width - len(ids))],
                *[slot, self._cache.length(slot), len(ids), *self._table(slot, shape.pages)],
            ]
            for slot, ids in zip(slots, tokens, strict=True)
        ]

    def step(self, slots: Sequence[int], blocks: Blocks) -> Tensor:
        return decided_apart(self, self._tower, slots, blocks)

    def prepare(self, width: int) -> None:
        if self._memory is None or width > USUAL_WIDTH:
            return
        started, before = time.monotonic(), len(self._passes)
        for shape in self._shapes(padded(width)):
            self._capture(shape, self._memory)
        captured, seconds = len(self._passes) - before, time.monotonic() - started
        logger.info("captured %d passes of width %d in %.1f s", captured, padded(width), seconds)

    def capture(self, slots: Sequence[int], width: int, timed: bool, want: Want, keeps_scans: bool = False) -> None:
        """The one pass that these slots' rows take, instead of all that `prepare` prepares."""
        if self._memory is not None:
            self._capture(replace(self._shape(slots, width, timed, want), keeps_scans=keeps_scans), self._memory)

    def _shape(self, slots: Sequence[int], longest: int, timed: bool, want: Want) -> PassShape:
        width = padded(longest)
        seen = max(map(self._cache.length, slots)) + (width if self._tower.causal else 0)
        pages = power_of_two(max(self._cache.room.pages_for(seen), self._fewest))
        return PassShape(power_of_two(len(slots)), width, pages, want, timed)

    @property
    def _fewest(self) -> int:
        """Pages of the narrowest table."""
        return pages_for(_FEWEST_SEEN, self._cache.page_tokens)

    def _shapes(self, width: int) -> Iterator[PassShape]:
        """All that the engines can ask for at this width. The largest first: the others fit into its memory."""
        if self._tower.causal:
            forms = [(want, False, False) for want in _wants(width)]
            forms += [(Want.HIDDEN, False, True)] * (width == USUAL_WIDTH)
        else:
            forms = [(Want.HIDDEN, True, False)] + [(Want.LOGITS, False, False)] * (width == 1)
        page_tokens = self._cache.page_tokens
        room = self._cache.keys.shape[1] * page_tokens
        most_pages = power_of_two(pages_for(min(self._longest or room, room) + width, page_tokens))
        unbounded = reads_in_place(self._tower, page_tokens)
        for rows in _powers_down(power_of_two(self._cache.scratch_slot), 1):
            for pages in _powers_down(max(most_pages, self._fewest), self._fewest):
                fits = unbounded or rows * pages * page_tokens <= MOST_SEEN
                if fits and rows * width <= MAX_POSITIONS:
                    yield from (PassShape(rows, width, pages, *form) for form in forms)

    def _table(self, slot: int, pages: int) -> list[int]:
        """Beyond a sequence's own pages nothing is seen, and padding is not written."""
        table = list(self._cache.pages_of(slot)[:pages])
        return table + [0] * (pages - len(table))

    def _pass(self, shape: PassShape) -> FixedPass | None:
        """None where captures are wanted and this shape was not captured at start."""
        found = self._passes.get(shape)
        if found is None and self._memory is None:
            found = self._passes[shape] = self._made(shape)
        return found

    @torch.inference_mode()
    def _capture(self, shape: PassShape, memory: CaptureMemory) -> None:
        if shape not in self._passes:
            made = self._made(shape)
            made.capture(memory)
            self._passes[shape] = made

    def _made(self, shape: PassShape) -> FixedPass:
        scans = self._room(shape) if shape.keeps_scans else None
        return FixedPass(self._tower, self._cache, shape, self._scratch, self._output(shape), scans)

    def _room(self, shape: PassShape) -> KeptScans | None:
        """Room for a shape's scans, as `_output`; none for a tower without a Mamba layer."""
        config, device = self._tower.config, self._tower.device
        if not config.layers_of("M"):
            return None
        if self._scans is None or self._scans.rows < shape.rows:
            self._scans = KeptScans.room(config, shape.rows, shape.width, device, self._tower.dtype)
        return self._scans.first(shape.rows)

    def _output(self, shape: PassShape) -> Tensor:
        """Room for a shape's output, shared with the others; passes captured before it grew keep what they had."""
        config = self._tower.config
        logits = shape.want is Want.LOGITS
        columns = config.vocab_size if logits else config.hidden_size
        dtype = torch.float32 if logits or config.residual_in_fp32 else self._tower.dtype
        numbers = shape.rows * shape.width * columns
        if logits not in self._outputs or self._outputs[logits].numel() < numbers:
            self._outputs[logits] = torch.empty(numbers, dtype=dtype, device=self._tower.device)
        return self._outputs[logits][:numbers].view(shape.rows, shape.width, columns)


def _wants(width: int) -> tuple[Want, ...]:
    """What a context engine asks for: commits and prompts at any width, an `ar` token's logits at width 1."""
    return (Want.HIDDEN, Want.STATES, Want.LOGITS) if width == 1 else (Want.HIDDEN, Want.STATES)


def reads_in_place(tower: ContextTower | DenoiserTower, page_tokens: int) -> bool:
    """Whether no layer gathers pages of so many positions."""
    layers = [module for module in tower.modules() if isinstance(module, Attention)]
    return readable_in_place(page_tokens) and all(layer.attend_in_pages is not None for layer in layers)


def power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _powers_down(first: int, last: int) -> Iterator[int]:
    """Powers of two."""
    while first >= last:
        yield first
        first //= 2
