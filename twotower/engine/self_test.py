"""The start-up self-test: a few tokens in every mode, before a pair is offered to anyone.

A broken kernel stack shows here, as one clear error, and not in a user's answer.
"""

from collections.abc import Sequence

from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.engine.pair import Pair
from twotower.errors import TwoTowerError, Unavailable

_PROMPT_TOKENS = 5


async def self_test(pair: Pair, modes: Sequence[Mode], timeout_s: float) -> None:
    """Decode a short known prompt in each mode. Raises Unavailable with the mode and the reason."""
    for mode in modes:
        try:
            got = await _decode(pair, mode, timeout_s)
        except TwoTowerError as error:
            raise Unavailable(f"self-test in {mode} mode failed: {error}") from error
        if got != _new_tokens(mode):
            raise Unavailable(f"self-test in {mode} mode failed: got {got} tokens, wanted {_new_tokens(mode)}")


def _new_tokens(mode: Mode) -> int:
    return 17 if mode is Mode.DIFFUSION else 3


async def _decode(pair: Pair, mode: Mode, timeout_s: float) -> int:
    params = DecodingParams(mode=mode, max_new_tokens=_new_tokens(mode), ignore_eos=True)
    prompt = tuple(range(1, 1 + _PROMPT_TOKENS))
    request = Request(RequestId(f"self-test-{mode}"), prompt, params)
    return sum([len(event.token_ids) async for event in pair.generate(request, timeout_s)])
