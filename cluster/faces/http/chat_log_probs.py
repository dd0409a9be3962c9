"""`logprobs` of a chat's choice, in OpenAI's shape for chats."""

from collections.abc import Iterable, Sequence
from typing import Any

from cluster.faces.http.chat_models import ContentLogProb
from twotower.core import Likelihood
from twotower.text.token_names import TokenNames

AT_ONCE = 32  # tokens: some milliseconds with 20 alternatives


def chat_log_probs(
    token_ids: Sequence[int], likelihoods: Sequence[Likelihood], names: TokenNames
) -> list[ContentLogProb]:
    """The log-probabilities of these tokens."""
    return [_content(token, one, names) for token, one in zip(token_ids, likelihoods, strict=True)]


def _content(token: int, likelihood: Likelihood, names: TokenNames) -> ContentLogProb:
    """Not validated again: a token may have 20 others beside it, and an answer thousands of tokens."""
    [own] = _told([token], [likelihood.log_prob], names)
    tops = _told(likelihood.top_token_ids, likelihood.top_log_probs, names)
    return ContentLogProb.model_construct(**own, top_logprobs=tops)


def _told(token_ids: Sequence[int], log_probs: Iterable[float], names: TokenNames) -> list[dict[str, Any]]:
    return [
        {"token": name, "logprob": log_prob, "bytes": list(name.encode()) if is_text else None}
        for (name, is_text), log_prob in zip(names.told(token_ids), log_probs, strict=True)
    ]
