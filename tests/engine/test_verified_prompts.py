"""`verified` and `auto` beside `ar` over thousands of random prompts, greedily: the same tokens but for near-ties.

`VERIFIED_PROMPTS` says how many of each checkpoint.
"""

import os
import random
from dataclasses import replace

import pytest

from tests.engine.decode import Decoded, decode_all
from tests.engine.test_determinism import CHECKPOINTS, one_thread, prompt_for, towers_of
from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.decoding.margins import NEAR_TIE

PROMPTS = int(os.environ.get("VERIFIED_PROMPTS", 1000))
AT_ONCE, TOKENS = 100, 24
MOST_DIFFERING = 0.002  # of prompts; each has a near-tie
__all__ = ["one_thread"]  # a fixture


def _same(ours: Decoded, ars: Decoded) -> bool:
    assert ours.margin is not None and ars.margin is not None
    same = (ours.token_ids, ours.finish_reason) == (ars.token_ids, ars.finish_reason)
    assert same or min(ours.margin, ars.margin) < NEAR_TIE, (ours, ars)
    return same


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_tokens_are_ars(name: str) -> None:
    towers, draw, differing = towers_of(name), random.Random(name), 0
    for first in range(0, PROMPTS, AT_ONCE):
        prompts = [prompt_for(towers, draw) for _ in range(min(AT_ONCE, PROMPTS - first))]
        ar = DecodingParams(Mode.AR, TOKENS, ignore_eos=draw.random() < 0.5)
        ways = [
            ar,
            *(replace(ar, mode=mode, block_size=draw.choice([3, 8, 16])) for mode in (Mode.VERIFIED, Mode.AUTO)),
        ]
        requests = [
            [Request(RequestId(f"{way.mode} {n}"), prompt, way) for n, prompt in enumerate(prompts)] for way in ways
        ]
        wanted, *others = (decode_all(towers.context, towers.denoiser, some) for some in requests)
        differing += sum(not _same(a, b) for got in others for a, b in zip(got, wanted, strict=True))
    print(f"{name}: {differing} of {2 * PROMPTS} differ")
    assert differing <= MOST_DIFFERING * max(2 * PROMPTS, 1000)
