"""Bare passes of full-size towers: time eagerly and as a graph, experts used, bytes moved against the roofline."""

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.gpu_parts.report import Report, table
from benchmarks.gpu_parts.site import Site
from benchmarks.gpu_parts.towers import filled_cache, random_tower
from twotower.config import MASK_TOKEN_ID
from twotower.decoding.unmasking import Blocks, StepParams
from twotower.engine.graphs import FixedPasses
from twotower.engine.passes import EagerPasses, Want, forward
from twotower.model.cache import TowerCache
from twotower.model.kernels import describe
from twotower.model.moe import Router
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.model.transfer import on_device

_BLOCK = 16
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Kind:
    """One kind of pass: what the denoiser does each step, or the context tower for a commit or an AR token."""

    name: str
    width: int
    want: Want
    timed: bool = False


# Rows are padded to a power of two, so products may sum up in another order.
_GRAPH_OFF = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

DENOISE = Kind("denoiser step", _BLOCK, Want.HIDDEN, timed=True)
COMMIT = Kind("commit", _BLOCK, Want.STATES)
AR_STEP = Kind("AR step", 1, Want.LOGITS)


class Bench:
    """Both towers on one device over one cache: the colocated placement."""

    def __init__(self, site: Site) -> None:
        self.site = site
        # On a GPU experts in fp32 make the host wait, which no capture may.
        self.dtype = torch.float32 if site.device.type == "cpu" else torch.bfloat16
        self.context = random_tower(ContextTower, site, self.dtype)
        self.denoiser = random_tower(DenoiserTower, site, self.dtype)
        self.cache, self.slots, scratch = filled_cache(site, self.dtype, max(site.batches), _BLOCK)
        self._fixed = {id(tower): FixedPasses(tower, self.cache, scratch) for tower in (self.context, self.denoiser)}

    def tower(self, kind: Kind) -> ContextTower | DenoiserTower:
        return self.denoiser if kind.timed else self.context

    def eager(self, kind: Kind, rows: int) -> Tensor:
        """One pass as the engines make it. Context passes write the same positions again; their states go on."""
        slots, lengths = self.slots[:rows], [kind.width] * rows
        tokens_RL = on_device(self._tokens(kind, rows), self.site.device)
        if kind.timed:
            states = self.cache.reading(slots, lengths, kind.width)
            t_R = on_device([0.75] * rows, self.site.device)
            return forward(self.denoiser, tokens_RL, states, t_R, kind.want)
        return forward(self.context, tokens_RL, self.cache.extending(slots, lengths, kind.width), None, kind.want)

    def step(self, blocks: Blocks) -> Tensor:
        """A denoiser's whole step, decision and all."""
        return EagerPasses(self.denoiser, self.cache).step(self.slots[: len(blocks.rows)], blocks)

    def graph(self, kind: Kind, rows: int) -> Tensor:
        t = [0.75] * rows if kind.timed else None
        fixed = self._fixed[id(self.tower(kind))]
        fixed.capture(self.slots[:rows], kind.width, kind.timed, kind.want)  # the first time
        return fixed.run(self.slots[:rows], self._tokens(kind, rows), t, kind.want)

    def graph_off(self, kind: Kind, rows: int) -> float:
        """Largest difference between a captured pass and an eager one from the same states. Result and states after
        the pass are compared, each divided by its largest number."""
        states = [(tensor, tensor[:, self.slots[:rows]].clone()) for tensor in (self.cache.conv, self.cache.ssm)]
        outcomes = []
        for run in (self.eager, self.graph):
            out = run(kind, rows).clone()
            outcomes.append([out, *(tensor[:, self.slots[:rows]].clone() for tensor, _ in states)])
            for tensor, before in states:
                tensor[:, self.slots[:rows]] = before
        pairs = zip(*outcomes, strict=True)
        off = [((eager - graph).abs().max() / eager.abs().max()).float() for eager, graph in pairs]
        return torch.stack(off).max().item()  # unlike Python's `max`, NaN where any of them is

    def experts(self, kind: Kind, rows: int) -> list[int]:
        """Different experts used, layer by layer."""
        used: list[int] = []
        routers = [module for module in self.tower(kind).modules() if isinstance(module, Router)]
        hooks = [
            router.register_forward_hook(lambda _module, _given, out: used.append(out[0].unique().numel()))
            for router in routers
        ]
        self.eager(kind, rows)
        for hook in hooks:
            hook.remove()
        return used

    def moved_bytes(self, kind: Kind, rows: int, used: Sequence[int]) -> int:
        """What a pass must at least read and write: weights (of used experts only), states, keys and values, logits. A
        denoiser step ends in front of the head here, which sees masked positions only."""
        moved = 0
        experts = iter(used)
        tower = self.tower(kind)
        for name, parameter in (*tower.named_parameters(), *tower.named_buffers()):
            if self._spared(kind, name):
                continue
            if name.endswith("experts.up_proj"):
                layer_used = next(experts)
            if ".mixer.experts." in name:
                moved += parameter[0].nbytes * layer_used
            elif not name.startswith("embeddings"):
                moved += parameter.nbytes
        cache = self.cache
        states = cache.conv[:, 0].nbytes + cache.ssm[:, 0].nbytes
        per_token = 2 * cache.keys[:, 0, 0].nbytes
        moved += rows * (states * (1 if kind.timed else 2) + per_token * self.site.cached)
        if kind.want is Want.LOGITS:
            moved += rows * kind.width * self.site.config.vocab_size * 4
        return moved

    def _spared(self, kind: Kind, name: str) -> bool:
        """Whether a pass leaves this parameter out: what follows the last state where that is all, and the head."""
        if kind.want is not Want.STATES:
            return kind.want is Want.HIDDEN and name.startswith(("head", "norm_f"))
        if not name.startswith("layers."):
            return not name.startswith("embeddings")
        layer = int(name.split(".")[1])
        last = self.context.last_kept
        return layer > last or (layer == last and name.endswith(("q_proj.weight", "o_proj.weight")))

    def _tokens(self, kind: Kind, rows: int) -> list[list[int]]:
        """Half of a block is masked, as midway through it."""
        words = self.site.config.vocab_size - 4

        def token(row: int, place: int) -> int:
            masked = kind.timed and place % 2
            return MASK_TOKEN_ID if masked else 4 + (7919 * row + 31 * place) % words

        return [[token(row, place) for place in range(kind.width)] for row in range(rows)]


@torch.inference_mode()
def run(site: Site, report: Report) -> None:
    if site.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(site.device)
    bandwidth = site.bandwidth()
    bench = Bench(site)
    report.add(_colocated(bench, bandwidth))
    rows: list[list[str]] = []
    plan = [(kind, batch) for kind in (DENOISE, COMMIT, AR_STEP) for batch in site.batches]
    for kind, batch in tqdm(plan, desc="passes", unit="pass"):
        rows.append(_measured(bench, kind, batch, bandwidth, report))
    report.add("## Passes\n\n" + table(_HEAD, rows) + "\n\n" + _LEGEND + f"\n\nPeak memory {site.peak_gib():.1f} GiB.")
    report.add(_waits(bench))
    del bench
    gc.collect()


_HEAD = [
    "pass", "rows", "eager, ms", "graph, ms", "graph − eager", "experts a layer", "moved, GB", "roofline, ms",
    "graph ÷ roofline", "tokens/s (graph)",
]  # fmt: skip
_LEGEND = (
    "Medians; making the states and the upload count, unmasking does not. `experts a layer`: different ones used, mean "
    "(smallest–largest). `moved`: what the pass must read and write at least; `roofline`: that at the copy bandwidth. "
    "`tokens/s`: positions a second, for a denoiser step those looked at, not those fixed. `graph − eager`: largest "
    "difference from the same states, by the largest number."
)


def _measured(bench: Bench, kind: Kind, batch: int, bandwidth: float, report: Report) -> list[str]:
    used = bench.experts(kind, batch)
    moved = bench.moved_bytes(kind, batch, used)
    eager = _seconds(bench, lambda: bench.eager(kind, batch))
    graph = _seconds(bench, lambda: bench.graph(kind, batch))
    off = bench.graph_off(kind, batch) if isinstance(eager, float) and isinstance(graph, float) else float("nan")
    if not off <= _GRAPH_OFF[bench.dtype]:
        report.fault(
            f"{kind.name} of {batch} rows: the captured pass is off by {off:.1e} (eager {eager}, graph {graph})"
        )
    best = graph if isinstance(graph, float) else eager if isinstance(eager, float) else float("nan")
    return [
        kind.name,
        str(batch),
        _ms(eager),
        _ms(graph),
        f"{off:.1e}",
        f"{sum(used) / len(used):.0f} ({min(used)}–{max(used)})",
        f"{moved / 1e9:.2f}",
        f"{moved / bandwidth * 1e3:.2f}",
        f"{best * bandwidth / moved:.2f}",
        f"{batch * kind.width / best:.0f}",
    ]


def _seconds(bench: Bench, call: Callable[[], object]) -> float | str:
    """A time, or why there is none: one pass that fails must not cost the others' results."""
    try:
        return bench.site.seconds(call)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}" if str(error) else type(error).__name__


def _ms(value: float | str) -> str:
    return f"{value * 1e3:.2f}" if isinstance(value, float) else value


def _colocated(bench: Bench, bandwidth: float) -> str:
    towers = {
        name: sum(p.nbytes for p in tower.parameters()) / 2**30
        for name, tower in (("context", bench.context), ("denoiser", bench.denoiser))
    }
    cache: TowerCache = bench.cache
    where = "one device" if bench.site.device.type == "cuda" else "the CPU"
    graphs = "captured graphs" if bench.site.device.type == "cuda" else "the same passes, NOT captured: no CUDA here"
    return (
        f"## Both towers on {where}\n\n"
        f"- weights: context {towers['context']:.1f} GiB, denoiser {towers['denoiser']:.1f} GiB, {bench.dtype}\n"
        f"- cache of {len(bench.slots)} sequences: {cache.nbytes / 2**30:.2f} GiB, peak so far "
        f"{bench.site.peak_gib():.1f} GiB\n"
        f"- copy bandwidth: {bandwidth / 1e12:.2f} TB/s\n"
        f"- kernels: {describe(bench.context)}\n"
        f"- `graph` means {graphs}"
    )


def _waits(bench: Bench) -> str:
    """Where torch says that the host waited for the device, within a pass and within unmasking."""
    title = "## Host waits\n\n"
    if bench.site.device.type != "cuda":
        return title + "Needs CUDA: torch reports them there only (tests/engine/test_host_waits.py looks by name)."
    rows = max(bench.site.batches)
    params = [StepParams(0.8, _BLOCK, 0.7 if row % 2 else 0.0, row) for row in range(rows)]
    blocks = Blocks([[MASK_TOKEN_ID] * _BLOCK] * rows, [[True] * _BLOCK] * rows, params)
    parts: dict[str, Callable[[], object]] = {
        kind.name: lambda kind=kind: bench.eager(kind, rows)  # type: ignore[misc]
        for kind in (DENOISE, COMMIT, AR_STEP)
    }
    parts["unmask"] = lambda: bench.step(blocks)
    lines = [[name, str(len(found := _waiting_places(part))), ", ".join(found)] for name, part in parts.items()]
    return title + table(["part", "places", "where"], lines)


def _waiting_places(part: Callable[[], object]) -> list[str]:
    part()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            part()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = (w for w in seen if "synchroniz" in str(w.message))
    return sorted({f"{w.filename.removeprefix(f'{_ROOT}/')}:{w.lineno}" for w in waits})
