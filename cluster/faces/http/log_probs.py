"""`logprobs` of a completion's choice, in OpenAI's shape."""

import asyncio
from collections.abc import Sequence

from cluster.faces.http.completion_models import LogProbs
from cluster.runs.run import Generating
from twotower.core import Likelihood
from twotower.text.token_names import TokenNames

AT_ONCE = 256  # tokens: some 10 ms with 20 alternatives


def log_probs(
    token_ids: Sequence[int], likelihoods: Sequence[Likelihood], offsets: Sequence[int], names: TokenNames
) -> LogProbs:
    """Of these tokens."""
    confidence = [one.confidence for one in likelihoods if one.confidence is not None]
    return LogProbs(
        tokens=names.of(token_ids),
        token_logprobs=[one.log_prob for one in likelihoods],
        top_logprobs=[names.valued(_ranked(pair)) for pair in zip(token_ids, likelihoods, strict=True)],
        text_offset=list(offsets),
        confidence=confidence or None,
    )


def _ranked(told: tuple[int, Likelihood]) -> list[tuple[int, float]]:
    """The token itself, which its name is to find, and the likeliest ones."""
    token, likelihood = told
    return [(token, likelihood.log_prob), *zip(likelihood.top_token_ids, likelihood.top_log_probs, strict=True)]


async def whole_log_probs(run: Generating, names: TokenNames) -> LogProbs | None:
    """Of a whole answer, where it was asked for. They may be very many: others have their turn meanwhile."""
    if run.request.logprobs is None:
        return None
    parts = []
    for first in range(0, len(run.token_ids), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        parts.append(log_probs(run.token_ids[part], run.likelihoods[part], run.offsets[part], names))
        await asyncio.sleep(0)
    return _joined(parts)


def _joined(parts: Sequence[LogProbs]) -> LogProbs:
    confidence = [one for part in parts for one in part.confidence or ()]
    return LogProbs(
        tokens=[one for part in parts for one in part.tokens],
        token_logprobs=[one for part in parts for one in part.token_logprobs],
        top_logprobs=[one for part in parts for one in part.top_logprobs],
        text_offset=[one for part in parts for one in part.text_offset],
        confidence=confidence or None,
    )
