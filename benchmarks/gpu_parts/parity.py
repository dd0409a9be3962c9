"""The golden checkpoints on this device against the CPU in fp32: numbers first, then whole runs token for token."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.gpu_parts.report import Report, table
from benchmarks.gpu_parts.site import FULL, Site
from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.engine.in_process import pair_of
from twotower.engine.settings import EngineSettings
from twotower.model.cache import TowerCache
from twotower.model.checkpoint import Checkpoint
from twotower.model.kernels import choose
from twotower.model.loading import load_context_tower, load_denoiser_tower
from twotower.model.tower import ContextTower, DenoiserTower

_GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
_CPU = torch.device("cpu")
_BLOCK = 16
# The tolerances of tests/golden/FORMAT.md, for fp32.
_AS_WANTED, _REPORTED = "as wanted", "reported"
_WANTED = {"context logits": 1e-3, "denoiser logits": 3e-3, "SSM states": 1e-3}


@dataclass(frozen=True)
class Way:
    """How to compute: on which device, in which dtype, through which kernels."""

    device: torch.device
    dtype: torch.dtype
    kernels: str

    def __str__(self) -> str:
        return f"{self.device.type} {str(self.dtype).removeprefix('torch.')} {self.kernels}"


_Towers = tuple[ContextTower, DenoiserTower]


def run(site: Site, report: Report) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    ways = [Way(site.device, dtype, kernels) for dtype in dtypes for kernels in ("auto", "torch")]
    if site.device.type != "cpu":
        # What bf16 alone does, to tell it from what the device does.
        ways.append(Way(_CPU, torch.bfloat16, "torch"))
    numbers, tokens = [], []
    models = sorted(path.parent for path in _GOLDEN.glob("*/vectors.json"))
    for directory in tqdm(models, desc="parity", unit="model"):
        checkpoint = Checkpoint.open(directory)
        vectors = json.loads((directory / "vectors.json").read_text())
        prompt = max((prompt["tokens"] for prompt in vectors["prompts"]), key=len)
        reference = _numbers(_load(checkpoint, Way(_CPU, torch.float32, "torch")), prompt)
        for way in ways:
            towers = _load(checkpoint, way)
            lines = list(_compared(directory.name, way, _numbers(towers, prompt), reference))
            numbers += lines
            for name, how, what, *_, verdict in lines:
                if verdict not in (_AS_WANTED, _REPORTED):
                    report.fault(f"parity of {name}, {how}: {what}: {verdict}")
            if way.kernels == "auto":
                same, total = asyncio.run(_runs(towers, vectors))
                tokens.append([directory.name, str(way), f"{same} of {total}"])
                if same < total and way.dtype is torch.float32:
                    report.fault(f"golden runs of {directory.name}, {way}: {same} of {total} give the stored tokens")
    report.add(
        "## Parity with the CPU in fp32\n\n"
        + table(["checkpoint", "computed on", "what", "largest difference", "same argmax", "verdict"], numbers)
        + "\n\nGolden prompts, teacher-forced: a prompt, a block after it, a half-masked block. bf16 promises no "
        "equality: it is reported. Kernels the 30B would take in bf16 here: "
        + str(choose(FULL, site.device, torch.bfloat16))
    )
    report.add(
        "## Golden runs, token for token\n\n"
        + table(["checkpoint", "computed on", "requests with the released code's tokens"], tokens)
        + "\n\nEvery `diffusion`, `ar` and `mock_ar` case, all at once through an in-process pair."
    )


def _load(checkpoint: Checkpoint, way: Way) -> _Towers:
    where = (way.device, way.dtype, False, way.kernels)
    return load_context_tower(checkpoint, *where), load_denoiser_tower(checkpoint, *where)


@torch.inference_mode()
def _numbers(towers: _Towers, prompt: list[int]) -> dict[str, Tensor]:
    """fp32 on the CPU: logits [L,V] of the prompt and a block, of a denoiser pass, and the SSM states after them."""
    context, denoiser = towers
    device = context.device
    cache = TowerCache(context.config, 1, len(prompt) // 16 + 3, device, context.dtype)
    slot = cache.allocate(len(prompt) + _BLOCK)
    logits = []
    block = [4 + i for i in range(_BLOCK)]
    for tokens in (prompt, block):
        states = cache.extending([slot], [len(tokens)], len(tokens))
        logits.append(context.logits(context(torch.tensor([tokens], device=device), states))[0])
        cache.advance(slot, len(tokens))
    half = torch.tensor([[3 if i % 2 else token for i, token in enumerate(block)]], device=device)
    hidden = denoiser(half, cache.reading([slot], [_BLOCK], _BLOCK), torch.tensor([0.5], device=device))
    found = {
        "context logits": torch.cat(logits),
        "denoiser logits": denoiser.logits(hidden)[0],
        "SSM states": cache.ssm[:, slot],
    }
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def _compared(name: str, way: Way, found: dict[str, Tensor], reference: dict[str, Tensor]) -> Iterator[list[str]]:
    for what, ours in found.items():
        difference = (ours - reference[what]).abs().max().item()
        agreement = "–"
        if "logits" in what:
            agreement = f"{(ours.argmax(-1) == reference[what].argmax(-1)).float().mean().item():.0%}"
        verdict = _REPORTED
        if way.dtype is torch.float32:
            verdict = _AS_WANTED if difference <= _WANTED[what] else f"MORE than the wanted {_WANTED[what]:g}"
        elif not torch.isfinite(ours).all():
            verdict = "NOT FINITE"
        yield [name, str(way), what, f"{difference:.1e}", agreement, verdict]


async def _runs(towers: _Towers, vectors: dict[str, Any]) -> tuple[int, int]:
    """How many of the golden runs give the stored tokens."""
    cases = list(_cases(vectors))
    settings = EngineSettings(max_sequences=16, max_sequence_length=512, max_queued_requests=2 * len(cases))
    async with pair_of(*towers, settings) as pair:

        async def tokens(request: Request) -> list[int]:
            return [token async for event in pair.generate(request, 120) for token in event.token_ids]

        results = await asyncio.gather(*(tokens(request) for request, _ in cases), return_exceptions=True)
    return sum(result == wanted for result, (_, wanted) in zip(results, cases, strict=True)), len(cases)


def _cases(vectors: dict[str, Any]) -> Iterator[tuple[Request, list[int]]]:
    for number, prompt in enumerate(vectors["prompts"]):
        ids = tuple(prompt["tokens"])
        for mode in (Mode.AR, Mode.MOCK_AR):
            wanted = prompt[str(mode)]["tokens"]
            params = DecodingParams(mode, len(wanted), ignore_eos=True)
            yield Request(RequestId(f"{number}-{mode}"), ids, params), wanted
        for case in prompt["cases"]:
            params = DecodingParams(
                Mode.DIFFUSION,
                len(case["output"]),
                case["block_size"],
                case["steps_per_block"],
                case["confidence_threshold"],
                ignore_eos=True,
            )
            yield Request(RequestId(f"{number}-{case['id']}"), ids, params), case["output"]
