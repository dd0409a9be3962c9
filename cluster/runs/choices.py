"""Several answers to one prompt: how many, their seeds, and which of them are the best."""

import asyncio
import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

from cluster.runs.run import Generating
from twotower.core import Request, RequestId
from twotower.errors import InvalidRequest
from twotower.parameters import Integer, Parameter

MAX_PROMPTS = 256  # prompts of a call, and answers to all of them together
N = Parameter(1, Integer(1, MAX_PROMPTS), "answers to each prompt", http="n")
BEST_OF = Parameter(
    None,
    Integer(1, MAX_PROMPTS),
    "answers decoded for each prompt; the likeliest `n` under the context tower are returned",
    http="best_of",
    default_is="`n`",
)
_SEED_BITS = 53  # as for drawn seeds: every JSON reader can hold them


def counts_of(n: object, best_of: object, streams: bool, prompts: int = 1) -> tuple[int, int]:
    """How many answers to each prompt are returned, and how many are decoded. `best_of` None: not given. Raises
    InvalidRequest.
    """
    choices = int(N.kind.read("n", n))
    tries = choices if best_of is None else int(BEST_OF.kind.read("best_of", best_of))
    if tries < choices:
        raise InvalidRequest.of("best_of", f"got {tries}, wanted at least n, which is {choices}")
    if tries > choices and streams:
        raise InvalidRequest.of("best_of", f"got {tries}, wanted n, which is {choices}, of a stream")
    if prompts * tries > MAX_PROMPTS:
        name, together = "n" if best_of is None else "best_of", prompts * tries
        told = f"got {tries} for each of {prompts} prompts, which is {together}; wanted at most {MAX_PROMPTS}"
        raise InvalidRequest.of(name, f"{told} answers of a call")
    return choices, tries


def tries_of(request: Request, count: int) -> list[Request]:
    """So many requests that differ in their seeds. The first has the original seed."""
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
    """The seed of the choice at `place`: the first 53 bits of SHA-256 of `SEED/PLACE`. So a request with the next seed
    gets new choices.
    """
    if place == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    return int.from_bytes(digest[:8]) >> (64 - _SEED_BITS)


async def told_of(runs: Sequence[Generating], choices: int, tries: int) -> Sequence[Generating]:
    """The answers that the client gets, of so many decoded for each prompt."""
    if tries == choices:
        return runs
    told = list[Generating]()
    for first in range(0, len(runs), tries):
        told += await best_of(runs[first : first + tries], choices)
    return told


async def best_of(runs: Sequence[Generating], count: int) -> list[Generating]:
    """The answers with the likeliest tokens under the context tower, the likeliest first; among equals the earlier one.
    The runs have ended and have likelihoods. These may be very many, so the loop runs other tasks meanwhile.
    """
    ranks = []
    for run in runs:
        ranks.append(log_prob_per_token([one.log_prob for one in run.likelihoods]))
        await asyncio.sleep(0)
    places = heapq.nlargest(count, range(len(runs)), key=ranks.__getitem__)
    return [runs[place] for place in places]


def log_prob_per_token(log_probs: Sequence[float]) -> float:
    """The mean log-probability of an answer's tokens, by which OpenAI ranks. An answer without tokens comes last."""
    return math.fsum(log_probs) / len(log_probs) if log_probs else -math.inf
