"""When a sequence has said all it may: end-of-sequence, the request's own stop tokens, its length."""

from collections.abc import Sequence

from twotower.core import DecodingParams, FinishReason


def cut(
    new_token_ids: Sequence[int], already: int, params: DecodingParams, eos_token_id: int
) -> tuple[tuple[int, ...], FinishReason | None]:
    """What to keep of freshly committed tokens, after `already` earlier ones, and whether the sequence ends there.

    The stopping token itself is kept. A whole last block may reach past `max_new_tokens`; the rest is cut off.
    """
    stops = set(params.stop_token_ids)
    if not params.ignore_eos:
        stops.add(eos_token_id)
    room = params.max_new_tokens - already
    for place, token in enumerate(new_token_ids[:room]):
        if token in stops:
            return tuple(new_token_ids[: place + 1]), FinishReason.STOP
    if len(new_token_ids) >= room:
        return tuple(new_token_ids[:room]), FinishReason.LENGTH
    return tuple(new_token_ids), None
