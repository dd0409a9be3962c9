"""The events of a gRPC answer as our commands know them. The service alone has a tokenizer: what tokens look like is
heard from the service, too."""

from collections.abc import Sequence

from twotower.commands.told import Piece
from twotower.core import Likelihood, RequestId, RoundEvent, StepEvent, TraceEvent
from twotower.pb.twotower.v1 import generation_pb2 as pb

_OURS = RequestId("")  # a command has one answer


class HeardTexts:
    """What the messages of a service have told of tokens. Without a tokenizer the service tells nothing."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def hear(self, token_ids: Sequence[int], texts: Sequence[str]) -> None:
        """`texts`: one for each token, or none."""
        self._known.update(zip(token_ids, texts, strict=False))

    def of(self, token_ids: Sequence[int]) -> list[str]:
        return [self._known.get(token, "") for token in token_ids] if self._known else []


def told_by(event: pb.GenerateStreamResponse, texts: HeardTexts, has_text: bool) -> Piece | TraceEvent | None:
    """None of `finished`. `has_text`: whether the service has a tokenizer; else a piece's text is its token ids."""
    match event.WhichOneof("event"):
        case "block":
            block = event.block
            text = block.text if has_text else "".join(f"{token} " for token in block.token_ids)
            likelihoods = zip(block.token_ids, block.likelihoods, strict=False)
            return Piece(text, list(block.token_ids), [_likelihood(*one, texts, has_text) for one in likelihoods])
        case "step":
            step = event.step
            texts.hear(step.token_ids, step.texts)
            fixed = tuple(step.positions), tuple(step.token_ids), tuple(step.confidence)
            return StepEvent(_OURS, step.start, step.size, step.step, *fixed)
        case "round":
            verdict = event.round
            texts.hear(verdict.draft, verdict.draft_texts)
            texts.hear([verdict.token_id], [verdict.text] if has_text else [])
            return RoundEvent(_OURS, verdict.start, tuple(verdict.draft), verdict.num_accepted, verdict.token_id)
    return None


def _likelihood(token: int, one: pb.Likelihood, texts: HeardTexts, has_text: bool) -> Likelihood:
    texts.hear(one.top_token_ids, one.top_texts)
    texts.hear([token], [one.text] if has_text else [])
    confidence = one.confidence if one.HasField("confidence") else None
    return Likelihood(one.log_prob, tuple(one.top_token_ids), tuple(one.top_log_probs), confidence)
