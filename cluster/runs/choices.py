"""Several answers to one prompt: their seeds, and which of them are the best."""

import asyncio
import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

from cluster.runs.run import Generating
from twotower.core import Request, RequestId

_SEED_BITS = 53  # as drawn ones: every reader of JSON holds them


def tries_of(request: Request, count: int) -> list[Request]:
    """So many requests that differ in their seeds. The first has the request's own."""
    if count == 1:
        return [request]
    seed = request.params.seed
    return [
        replace(
            request,
            id=RequestId(f"{request.id}-{place}"),
            params=replace(request.params, seed=derived_seed(seed, place)),
        )
        for place in range(count)
    ]


def derived_seed(seed: int, place: int) -> int:
    """That of the choice at `place`: the first 53 bits of SHA-256 of `SEED/PLACE`. Whoever asks with the next seed does
    not get choices that are known already."""
    if place == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    return int.from_bytes(digest[:8]) >> (64 - _SEED_BITS)


async def best_of(runs: Sequence[Generating], count: int) -> list[Generating]:
    """Those whose tokens the context tower finds likeliest, the likeliest first; among equals the earlier one. The runs
    are over, and have likelihoods. They may have very many: others have their turn meanwhile."""
    ranks = []
    for run in runs:
        ranks.append(log_prob_per_token([one.log_prob for one in run.likelihoods]))
        await asyncio.sleep(0)
    places = heapq.nlargest(count, range(len(runs)), key=ranks.__getitem__)
    return [runs[place] for place in places]


def log_prob_per_token(log_probs: Sequence[float]) -> float:
    """The mean over an answer's tokens, which OpenAI ranks by. An answer without any comes last."""
    return math.fsum(log_probs) / len(log_probs) if log_probs else -math.inf
