"""`logprobs` of a completion's choice, in OpenAI's shape."""

import asyncio
from collections.abc import Sequence

from cluster.faces.http.completion_models import LogProbs
from cluster.runs.echoing import Echoing
from cluster.runs.run import Generating
from twotower.core import Likelihood
from twotower.text.token_names import TokenNames

AT_ONCE = 64  # tokens: some milliseconds with 20 alternatives

Likelihoods = Sequence[Likelihood | None]  # None for a token that follows nothing


def log_probs(
    token_ids: Sequence[int], likelihoods: Likelihoods, offsets: Sequence[int], names: TokenNames
) -> LogProbs:
    """The log-probabilities of these tokens."""
    confidence = [None if one is None else one.confidence for one in likelihoods]
    return LogProbs(
        tokens=names.of(token_ids),
        token_logprobs=[None if one is None else one.log_prob for one in likelihoods],
        top_logprobs=[_top(token, one, names) for token, one in zip(token_ids, likelihoods, strict=True)],
        text_offset=list(offsets),
        confidence=confidence if any(one is not None for one in confidence) else None,
    )


def _top(token: int, likelihood: Likelihood | None, names: TokenNames) -> dict[str, float] | None:
    """The token itself, to be found by its name, and the likeliest ones."""
    if likelihood is None:
        return None
    alternatives = zip(likelihood.top_token_ids, likelihood.top_log_probs, strict=True)
    return names.valued([(token, likelihood.log_prob), *alternatives])


async def whole_log_probs(run: Generating | Echoing, names: TokenNames) -> LogProbs:
    """The log-probabilities of a whole answer. There may be very many, so the loop runs other tasks meanwhile."""
    token_ids, likelihoods, offsets = run.token_ids, run.likelihoods, run.offsets
    parts = []
    for first in range(0, len(token_ids), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        parts.append(log_probs(token_ids[part], likelihoods[part], offsets[part], names))
        await asyncio.sleep(0)
    return _joined(parts)


def _joined(parts: Sequence[LogProbs]) -> LogProbs:
    """The log-probabilities of the tokens of all parts."""
    confidence = [one for part in parts for one in part.confidence or [None] * len(part.tokens)]
    return LogProbs(
        tokens=[one for part in parts for one in part.tokens],
        token_logprobs=[one for part in parts for one in part.token_logprobs],
        top_logprobs=[one for part in parts for one in part.top_logprobs],
        text_offset=[one for part in parts for one in part.text_offset],
        confidence=confidence if any(part.confidence for part in parts) else None,
    )
