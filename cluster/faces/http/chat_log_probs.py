"""`logprobs` of a chat's choice, in OpenAI's shape for chats."""

from collections.abc import Sequence
from typing import Any

from cluster.faces.http.chat_models import ContentLogProb, TokenLogProb
from twotower.core import Likelihood
from twotower.text.token_names import TokenNames

AT_ONCE = 64  # tokens: some milliseconds with 20 alternatives


def chat_log_probs(
    token_ids: Sequence[int], likelihoods: Sequence[Likelihood], names: TokenNames
) -> list[ContentLogProb]:
    """Of these tokens."""
    return [_content(token, one, names) for token, one in zip(token_ids, likelihoods, strict=True)]


def _content(token: int, likelihood: Likelihood, names: TokenNames) -> ContentLogProb:
    told = names.told([token, *likelihood.top_token_ids])
    log_probs = [likelihood.log_prob, *likelihood.top_log_probs]
    tops = [TokenLogProb.model_construct(**_told(*one)) for one in zip(told[1:], log_probs[1:], strict=True)]
    return ContentLogProb.model_construct(**_told(told[0], likelihood.log_prob), top_logprobs=tops)


def _told(named: tuple[str, bool], log_prob: float) -> dict[str, Any]:
    name, is_text = named
    return {"token": name, "logprob": log_prob, "bytes": list(name.encode()) if is_text else None}
