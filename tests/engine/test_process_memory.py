"""What a process that holds pairs takes, each time in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]

# Every form of pass is recorded the first time it comes up, as on a CPU after it has come up often.
_PAIRS = """
import asyncio, gc, psutil
from tests.engine.decode import collect, plain_request
from tests.goldens import vendored
from twotower.core import Mode
from twotower.engine import capture
from twotower.engine.in_process import pair_of
from twotower.engine.settings import EngineSettings

capture.OFTEN = 1
model, settings = vendored("tt_dense"), EngineSettings(2, 64)

async def use() -> None:
    async with pair_of(model.context, model.denoiser, settings) as pair:
        await asyncio.gather(*(collect(pair, plain_request(mode, mode)) for mode in (Mode.AR, Mode.DIFFUSION)))

for _ in range(20):
    asyncio.run(use())
    gc.collect()
    print(psutil.Process().memory_info().rss)
"""

_LOADED = """
import sys, torch
from tests.goldens import CPU, VENDORED
from twotower.engine.capture import passes_for
from twotower.engine.memory import memory_of
from twotower.engine.settings import EngineSettings
from twotower.model.cache import TowerCache
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower
from twotower.model.tower import ContextTower

memory_of(Checkpoint.open(VENDORED / "tt_moe").config, EngineSettings(), torch.float32, [ContextTower])
tower = load_context_tower(Checkpoint.open(VENDORED / "tt_moe"), CPU, torch.float32)
with torch.inference_mode():
    cache = TowerCache(tower.config, 2, 8, CPU, torch.float32)
    passes_for(tower, cache, "on").run([cache.allocate(16)], [[5] * 16])
for name in ("torch._dynamo", "torch._inductor", "torch.onnx", "sympy", "transformers"):
    print(name, name in sys.modules)
"""


def _run(script: str) -> list[str]:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.slow
def test_twenty_pairs_that_come_and_go_leave_nothing_behind() -> None:
    """Programs that TorchScript keeps (`torch.jit.trace`) cost this small model 35 MB a pair. Our own, were they kept,
    would cost 9 MB: a tenth of that is some 16 MB over all pairs. Seen: less than 1 MB."""
    taken = [int(line) / 1e6 for line in _run(_PAIRS)]
    assert len(taken) == 20
    assert taken[-1] - taken[1] < 8, f"MB after each pair: {taken}"


@pytest.mark.slow
def test_a_tower_needs_neither_torchs_compiler_nor_transformers() -> None:
    """The compiler alone takes 80 MB and a second of every start."""
    assert [line for line in _run(_LOADED) if line.endswith("True")] == []
