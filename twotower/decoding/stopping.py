"""When a sequence ends: end-of-sequence, the request's own stop tokens, its length."""

from collections.abc import Sequence

from twotower.core import DecodingParams, FinishReason


class Stopping:
    """The end conditions of one sequence. `stops`: the tokens that end it."""

    def __init__(self, params: DecodingParams, eos_token_id: int) -> None:
        self.stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {eos_token_id})
        self._most = params.max_new_tokens

    def ends(self, token: int) -> bool:
        """Whether nothing follows this token."""
        return token in self.stops

    def cut(self, new_token_ids: Sequence[int], already: int) -> tuple[tuple[int, ...], FinishReason | None]:
        """What to keep of freshly committed tokens, after `already` earlier ones, and whether the sequence ends there.

        The stopping token itself is kept. A whole last block may reach past `max_new_tokens`; the rest is cut off.
        """
        room = self._most - already
        for place, token in enumerate(new_token_ids[:room]):
            if self.ends(token):
                return tuple(new_token_ids[: place + 1]), FinishReason.STOP
        if len(new_token_ids) >= room:
            return tuple(new_token_ids[:room]), FinishReason.LENGTH
        return tuple(new_token_ids), None
