"""In fp32 a request's tokens are its own: whoever shares its batch, wherever its towers are, however many denoisers.

Random requests, each alone first, then all of them together in random arrangements, where some of them ask for
likelihoods, too. What differs must have a recorded margin below 1e-5. `DETERMINISM_ROUNDS` says how many rounds of each
arrangement; by default one for each checkpoint.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch

import twotower
from tests.engine.arrangements import ARRANGEMENTS, Towers, alone
from tests.engine.decode import Decoded
from tests.goldens import CPU, MODELS, golden
from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.decoding.margins import NEAR_TIE
from twotower.demo.corpus import stream
from twotower.model.checkpoint import Checkpoint
from twotower.model.loading import load_context_tower, load_denoiser_tower
from twotower.text.tokenizer import encode_prompt, load_tokenizer

DEMO = Path(twotower.__file__).parent / "demo" / "checkpoint"
CHECKPOINTS = [*MODELS, "demo"]
ROUNDS = int(os.environ.get("DETERMINISM_ROUNDS", len(CHECKPOINTS)))
FIRST_SEED = int(os.environ.get("DETERMINISM_SEED", 0))
REQUESTS = 8
MOST_DIFFERING, MOST_NEAR_TIES = 0.001, 0.003  # of requests; the latter without those at a threshold of 1
MANY = 1000  # requests from which on these shares mean something
SMALL = 0.01  # margins of which the noise is looked at


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Engines on threads of their own would fight for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def towers_of(name: str) -> Towers:
    if name != "demo":
        return Towers(name, golden(name).context, golden(name).denoiser)
    checkpoint = Checkpoint.open(DEMO)
    context = load_context_tower(checkpoint, CPU, torch.float32)
    return Towers(name, context, load_denoiser_tower(checkpoint, CPU, torch.float32))


def make_request(name: str, number: int, towers: Towers, draw: random.Random) -> Request:
    mode = draw.choice([Mode.DIFFUSION, Mode.DIFFUSION, Mode.MOCK_AR, Mode.AR, Mode.VERIFIED, Mode.AUTO])
    params = _diffusion(draw) if mode is Mode.DIFFUSION else _causal(mode, draw)
    return Request(RequestId(f"{name} {number}"), prompt_for(towers, draw), params, draw.choice([0, 0, -1, 2]))


def _diffusion(draw: random.Random) -> DecodingParams:
    size = draw.choice([1, 3, 8, 16, 16, 32])
    return DecodingParams(
        Mode.DIFFUSION,
        draw.choice([5, 16, 24]),
        size,
        draw.choice([1, 2, size, size, 40]),
        draw.choice([0.0, 0.1, 0.5, 0.8, 0.8, 1.0]),
        draw.choice([0.0, 0.0, 0.1, 0.7, 1.0, 3.0]),
        draw.choice([0, 0, 3, 40]),
        draw.choice([1.0, 1.0, 0.7, 0.95]),
        seed=draw.randrange(2**53),
        ignore_eos=draw.random() < 0.7,
    )


def _causal(mode: Mode, draw: random.Random) -> DecodingParams:
    return DecodingParams(
        mode,
        draw.choice([1, 7, 16]),
        temperature=draw.choice([0.0, 0.2, 0.7, 1.0, 1.5]),
        top_k=draw.choice([0, 0, 3, 40]),
        top_p=draw.choice([1.0, 1.0, 0.7, 0.95]),
        seed=draw.randrange(2**53),
        ignore_eos=draw.random() < 0.7,
    )


def prompt_for(towers: Towers, draw: random.Random) -> tuple[int, ...]:
    if towers.name == "demo" and draw.random() < 0.7:
        instance = next(stream("test", draw.random()))  # type: ignore[arg-type]
        return tuple(encode_prompt(load_tokenizer(DEMO), instance.prompt, 4096))
    return tuple(draw.randrange(towers.config.vocab_size) for _ in range(draw.choice([1, 2, 15, 16, 17, 40, 70, 130])))


@dataclass
class Tally:
    """What the comparisons of one test came to. `noise`: by how much small margins of one request differed at most.

    `saturated` are near-ties at a threshold of 1, where a confident tower's positions go in an order decided among
    confidences that fp32 rounds to 1.
    """

    requests: int = 0
    near_ties: int = 0
    saturated: int = 0
    differing: int = 0
    noise: float = 0.0

    def compare(self, request: Request, own: Decoded, together: Decoded, where: str) -> None:
        assert own.margin is not None and together.margin is not None
        margin = min(own.margin, together.margin)
        self.requests += 1
        self.near_ties += margin < NEAR_TIE
        self.saturated += margin < NEAR_TIE and request.params.confidence_threshold == 1.0
        if _content(request, own) == _content(request, together):
            if margin < SMALL:
                self.noise = max(self.noise, abs(own.margin - together.margin))
            return
        self.differing += 1
        print(f"{where}: {request.id} differs at a margin of {margin:.1e}: {request.params}")
        assert margin < NEAR_TIE, f"{where}, {request}: {own} alone, {together} in company"

    def __str__(self) -> str:
        return (
            f"{self.requests} requests: {self.near_ties} with a near-tie, {self.saturated} of these at a threshold "
            f"of 1; {self.differing} differing; small margins differ by {self.noise:.1e} at most"
        )


def _content(request: Request, result: Decoded) -> tuple[object, ...]:
    """In `verified` and `auto` the cost may change, but no token: rounding changes a draft, the load a choice."""
    told = result.token_ids, result.finish_reason
    return told if request.params.mode in (Mode.VERIFIED, Mode.AUTO) else (*told, result.num_steps, result.num_blocks)


@pytest.mark.timeout(0 if ROUNDS > 50 else 120)
@pytest.mark.parametrize(
    "arrangement", [name if name == "split" else pytest.param(name, marks=pytest.mark.slow) for name in ARRANGEMENTS]
)
@pytest.mark.slow
def test_tokens_are_a_requests_own(arrangement: str) -> None:
    tally = Tally()
    for number in range(FIRST_SEED, FIRST_SEED + ROUNDS):
        draw = random.Random(f"{arrangement} {number}")
        towers = towers_of(CHECKPOINTS[number % len(CHECKPOINTS)])
        requests = [make_request(f"{number}", place, towers, draw) for place in range(REQUESTS)]
        own = alone(towers, requests)
        draw.shuffle(requests)
        asking = [replace(request, logprobs=(None, 0, 7)[place % 3]) for place, request in enumerate(requests)]
        together = ARRANGEMENTS[arrangement](towers, asking, draw)
        for request in requests:
            tally.compare(request, own[request.id], together[request.id], f"{arrangement}, {towers.name}")
    print(f"{arrangement}: {tally}")
    assert tally.differing <= MOST_DIFFERING * max(tally.requests, MANY)
    assert tally.near_ties - tally.saturated <= MOST_NEAR_TIES * max(tally.requests, MANY)
