"""A request that was begun elsewhere goes on where it stood: the same tokens, nothing twice, nothing left out.

Random requests, alone to their end first, then again from after some of their blocks, in company. What differs must
have a recorded margin below 1e-5, as in test_determinism.py. `RESUME_ROUNDS` says how many rounds of each arrangement.
"""

import os
import random
from dataclasses import replace

import pytest

from tests.engine.arrangements import ARRANGEMENTS, SETTINGS, Towers, alone
from tests.engine.decode import Decoded, collect, decode_all, plain_request
from tests.engine.test_determinism import CHECKPOINTS, make_request, towers_of
from tests.goldens import golden
from twotower.core import Mode, Request, RequestId
from twotower.decoding.margins import NEAR_TIE
from twotower.engine.in_process import pair_of
from twotower.errors import InvalidRequest

ROUNDS = int(os.environ.get("RESUME_ROUNDS", len(CHECKPOINTS)))
REQUESTS, MOST_CUTS = 5, 4


def _cut(request: Request, whole: Decoded, at: int) -> Request:
    return replace(request, id=RequestId(f"{request.id} from {at}"), committed=tuple(whole.token_ids[:at]))


def _blocks(request: Request) -> int:
    """Of those it brings."""
    width = request.params.block_size if request.params.mode is Mode.DIFFUSION else 1
    return len(request.committed) // width


def _compare(request: Request, whole: Decoded, resumed: Decoded) -> bool:
    """Whether they are equal; a difference needs a near-tie."""
    assert whole.margin is not None and resumed.margin is not None
    same = (resumed.token_ids, resumed.finish_reason) == (whole.token_ids, whole.finish_reason)
    assert same or min(whole.margin, resumed.margin) < NEAR_TIE, (request, whole, resumed)
    if same and request.params.mode not in (Mode.VERIFIED, Mode.AUTO):  # its rounds begin elsewhere now
        assert resumed.num_blocks == whole.num_blocks - _blocks(request), "the work of this attempt alone"
    return same


@pytest.mark.slow
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_a_resumed_request_ends_as_it_would_have(arrangement: str) -> None:
    compared = differing = 0
    for number in range(ROUNDS):
        draw = random.Random(f"resume {arrangement} {number}")
        towers: Towers = towers_of(CHECKPOINTS[number % len(CHECKPOINTS)])
        requests = [make_request(f"{number}", place, towers, draw) for place in range(REQUESTS)]
        whole = alone(towers, requests)
        again: dict[RequestId, Request] = {}
        for request in requests:
            cuts = whole[request.id].starts[1:]
            for at in draw.sample(cuts, min(MOST_CUTS, len(cuts))):
                again[request.id + str(at)] = _cut(request, whole[request.id], at)  # type: ignore[index]
        asked = list(again.values())
        draw.shuffle(asked)
        resumed = ARRANGEMENTS[arrangement](towers, asked, draw)
        for request in requests:
            for resumption in asked:
                if resumption.id.startswith(f"{request.id} from "):
                    compared += 1
                    differing += not _compare(resumption, whole[request.id], resumed[resumption.id])
    assert compared >= 5 * ROUNDS, "too few to show anything"
    assert differing <= compared // 100


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("length", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (63, 64)), 65])
@pytest.mark.slow
def test_from_every_cut_of_one_answer(mode: Mode, length: int) -> None:
    """Prompts about as long as a chunk; the ends of chunks lie elsewhere in what a resumed request reads."""
    towers = golden("tt_moe")
    request = plain_request("whole", mode, new=40, prompt=[4 + i % 60 for i in range(length)])
    [whole] = decode_all(towers.context, towers.denoiser, [request])
    step = 16 if mode is Mode.DIFFUSION else 1
    resumptions = [_cut(request, whole, at) for at in range(0, 40, step)]
    for resumption, resumed in zip(resumptions, decode_all(towers.context, towers.denoiser, resumptions), strict=True):
        assert _compare(resumption, whole, resumed)
        assert resumption.positions == request.positions


@pytest.mark.parametrize(
    ("mode", "count", "words"),
    [
        (Mode.AR, 16, r"committed: got 16 tokens, wanted fewer than max_new_tokens \(16\)"),
        (Mode.DIFFUSION, 3, "committed: got 3 tokens, wanted whole blocks of 16"),
    ],
)
async def test_what_cannot_be_gone_on_with_is_refused(mode: Mode, count: int, words: str) -> None:
    towers = golden("tt_dense")
    request = replace(plain_request("a", mode, new=16), committed=(5,) * count)
    async with pair_of(towers.context, towers.denoiser, SETTINGS) as pair:
        with pytest.raises(InvalidRequest, match=words):
            await collect(pair, request)
        assert pair.ledger.running == pair.ledger.waiting == 0
