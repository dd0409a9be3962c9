"""One attention layer of the 30B's shape over a real cache: pages read in place against the same pages gathered."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_parts.report import Report, table
from benchmarks.gpu_parts.site import Site
from twotower.model.attention import Attention
from twotower.model.cache import TowerCache
from twotower.model.kernels import choose
from twotower.model.loading import materialise
from twotower.model.pages import page_tokens_on, pages_for
from twotower.model.states import LayerStates
from twotower.model.tower import ContextTower

_BLOCK = 16
_CONTEXTS, _TINY_CONTEXTS = (1024, 8192, 32768), (40, 300)
# Of the largest value. Two results are rounded before they are mixed; each path sums up in an order of its own.
_MOST_OFF = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class _Case:
    """`width` positions of each row behind so many that are cached, causally or only looked at."""

    name: str
    width: int
    updates: bool

    def states(self, cache: TowerCache, slots: list[int]) -> LayerStates:
        make = cache.extending if self.updates else cache.reading
        return make(slots, [self.width] * len(slots), self.width)


_CASES = (_Case("denoiser step", _BLOCK, False), _Case("commit", _BLOCK, True), _Case("AR step", 1, True))


class _Timed(NamedTuple):
    """Median seconds of a call, and what it gives."""

    seconds: float
    out: Tensor


class _Layer:
    """One attention layer, through either of the chosen kernels."""

    def __init__(self, site: Site, dtype: torch.dtype) -> None:
        self.site, self.dtype = site, dtype
        self.config = replace(site.config, hybrid_override_pattern="*", vocab_size=16)
        self.kernels = choose(self.config, site.device, dtype)
        self._random = torch.Generator(site.device).manual_seed(3)
        with torch.device("meta"):
            tower = ContextTower(self.config)
        materialise(tower, site.device, dtype)
        [self._layer] = (module for module in tower.modules() if isinstance(module, Attention))
        for weight in self._layer.parameters():
            weight.normal_(0, 0.02, generator=self._random)

    def compared(self, case: _Case, cache: TowerCache, slots: list[int]) -> tuple[_Timed, _Timed]:
        """In place and gathered."""
        shape = len(slots), case.width, self.config.hidden_size
        x_RLD = torch.randn(shape, generator=self._random, device=self.site.device).to(self.dtype)

        def timed(in_place: bool) -> _Timed:
            self._layer.attend = self.kernels.attend
            self._layer.attend_in_pages = self.kernels.attend_in_pages if in_place else None

            def call() -> Tensor:
                out: Tensor = self._layer(x_RLD, 0, case.states(cache, slots))
                return out

            return _Timed(self.site.seconds(call), call())

        return timed(True), timed(False)


@torch.inference_mode()
def run(site: Site, report: Report) -> None:
    """Making the states counts, as it does in a pass."""
    layer = _Layer(site, torch.float32 if site.device.type == "cpu" else torch.bfloat16)
    rows: list[list[str]] = []
    for context in _TINY_CONTEXTS if site.tiny else _CONTEXTS:
        for batch in site.batches:
            cache, slots = _filled(layer, context, batch)
            for case in _CASES:
                in_place, gathered = layer.compared(case, cache, slots)
                off = _off(in_place.out, gathered.out)
                if not off <= _MOST_OFF[layer.dtype]:
                    report.fault(f"{case.name} of {batch} rows behind {context}: pages in place are off by {off:.1e}")
                times = [f"{in_place.seconds * 1e3:.3f}", f"{gathered.seconds * 1e3:.3f}"]
                ratio = f"{gathered.seconds / in_place.seconds:.2f}"
                rows.append([case.name, str(context), str(batch), *times, ratio, f"{off:.1e}"])
    how = "\n".join(f"- {choice}" for choice in layer.kernels.choices if choice.part.startswith("attention"))
    without = (
        "" if layer.kernels.attend_in_pages else "\n\n**No kernel reads pages in place here: both columns gather.**"
    )
    title, legend = "## Pages in place\n\n", f"\n\nOne layer with its projections, {layer.dtype}; medians.\n\n"
    report.add(title + table(_HEAD, rows) + legend + how + without)


_HEAD = ["pass", "cached a row", "rows", "in place, ms", "gathered, ms", "gathered ÷ in place", "largest difference"]


def _filled(layer: _Layer, context: int, rows: int) -> tuple[TowerCache, list[int]]:
    """Every row has read so many positions."""
    device, each = layer.site.device, context + _BLOCK
    pages = rows * pages_for(each, page_tokens_on(device.type))
    cache = TowerCache(layer.config, rows, pages, device, layer.dtype)
    slots = [cache.allocate(each) for _ in range(rows)]
    random = torch.Generator(device).manual_seed(4)
    for part in (cache.keys[:, 2:], cache.values[:, 2:]):
        part.normal_(0, 0.5, generator=random)
    for slot in slots:
        cache.advance(slot, context)
    return cache, slots


def _off(ours: Tensor, plain: Tensor) -> float:
    return ((ours.float() - plain.float()).abs().max() / plain.float().abs().max()).item()
