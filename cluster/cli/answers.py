"""The events of an answer for our commands. Only the service has a tokenizer, so tokens' texts come from the service,
too.
"""

from collections.abc import Sequence

import twotower_client
from twotower.commands.told import Piece
from twotower.core import Likelihood, RequestId, RoundEvent, StepEvent, TraceEvent
from twotower_client import Block, Event, Round, Step

_OURS = RequestId("")  # a command has one answer


class HeardTexts:
    """Tokens' texts from the service's messages. Without a tokenizer the service sends none."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def hear(self, token_ids: Sequence[int], texts: Sequence[str]) -> None:
        """`texts`: one for each token, or none."""
        self._known.update(zip(token_ids, texts, strict=False))

    def of(self, token_ids: Sequence[int]) -> list[str]:
        return [self._known.get(token, "") for token in token_ids] if self._known else []


def told_by(event: Event, texts: HeardTexts, has_text: bool) -> Piece | TraceEvent | None:
    """None for the end. `has_text`: whether the service has a tokenizer; without one, a piece's text is
    its token ids.
    """
    match event:
        case Block():
            text = event.text if has_text else "".join(f"{token} " for token in event.token_ids)
            likelihoods = zip(event.token_ids, event.likelihoods, strict=False)
            return Piece(text, list(event.token_ids), [_likelihood(*one, texts, has_text) for one in likelihoods])
        case Step():
            texts.hear(event.token_ids, event.texts)
            fixed = event.positions, event.token_ids, event.confidence
            return StepEvent(_OURS, event.start, event.size, event.step, *fixed)
        case Round():
            texts.hear(event.draft, event.draft_texts)
            texts.hear([event.token_id], [event.text] if has_text else [])
            return RoundEvent(_OURS, event.start, event.draft, event.num_accepted, event.token_id)
    return None


def _likelihood(token: int, one: twotower_client.Likelihood, texts: HeardTexts, has_text: bool) -> Likelihood:
    ids = tuple(top.token_id for top in one.top if top.token_id is not None)
    assert one.log_prob is not None and len(ids) == len(one.top), "gRPC tells both of each token"
    if has_text:
        texts.hear(ids, [top.text for top in one.top])
        texts.hear([token], [one.text])
    return Likelihood(one.log_prob, ids, tuple(top.log_prob for top in one.top), one.confidence)
