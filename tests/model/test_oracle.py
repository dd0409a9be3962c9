"""A second, independent oracle: transformers' own `nemotron_h` on the context tower's weights.

It clamps dt from below in prefill unless `time_step_min` is 0. It drops attention biases, so the dense golden
checkpoint, which has some, cannot be compared. The causal model without biases can.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.decode import decode_all
from tests.goldens import CPU, vendored
from tests.model.checkpoints import base_tensors, config_of, tensors_of, write
from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.model.cache import TowerCache
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower
from twotower.model.tower import ContextTower

pytestmark = pytest.mark.slow  # it imports transformers' models

NAME = "tt_moe"
PROMPT = [int(token) for token in torch.randint(4, 128, (50,), generator=torch.Generator().manual_seed(0))]
NEW = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_of(NAME) | {"time_step_min": 0.0, "architectures": ["NemotronHForCausalLM"]}
    del config["auto_map"]
    return write(tmp_path_factory.mktemp("base"), base_tensors(tensors_of(NAME)), config)


@pytest.fixture(scope="module")
def theirs(base: Path) -> Iterator[Any]:
    from transformers import AutoModelForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(
        str(base), dtype=torch.float32, trust_remote_code=False, local_files_only=True
    )
    with torch.inference_mode():
        yield model.eval()


@pytest.fixture(scope="module")
def ours(base: Path) -> ContextTower:
    return load_context_tower(Checkpoint.open(base), CPU, torch.float32)


def _our_logits(tower: ContextTower, tokens: list[int]) -> Tensor:
    cache = TowerCache(tower.config, 1, 8, CPU, torch.float32)
    slot = cache.allocate(len(tokens))
    with torch.inference_mode():
        return tower.logits(tower(torch.tensor([tokens]), cache.extending([slot], [len(tokens)], len(tokens))))[0]


def test_logits(theirs: Any, ours: ContextTower) -> None:
    wanted = theirs(torch.tensor([PROMPT])).logits[0].float()
    assert (wanted - _our_logits(ours, PROMPT)).abs().max().item() <= 1e-4


def test_greedy_tokens(theirs: Any, ours: ContextTower) -> None:
    """Each of our tokens is the likeliest after those before it, and so theirs, one after the other."""
    params = DecodingParams(mode=Mode.AR, max_new_tokens=NEW, ignore_eos=True)
    [result] = decode_all(ours, None, [Request(RequestId("r"), tuple(PROMPT), params)])
    likeliest = theirs(torch.tensor([PROMPT + result.token_ids])).logits[0].argmax(-1).tolist()
    assert len(result.token_ids) == NEW and likeliest[len(PROMPT) - 1 : -1] == result.token_ids


def test_the_base_holds_the_golden_context_tower(ours: ContextTower) -> None:
    assert torch.equal(_our_logits(ours, PROMPT), _our_logits(vendored(NAME).context, PROMPT))
