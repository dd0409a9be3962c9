"""Which of a block's tokens are certain under a grammar, which is refused first, and what may come behind them."""

from collections.abc import Sequence

import torch

from tests.decoding.deciding import decide
from tests.decoding.languages import EOS, Language
from twotower.config import MASK_TOKEN_ID as MASK
from twotower.core import DecodingParams, Mode
from twotower.decoding.certain_prefix import Allowed, CertainPrefix
from twotower.decoding.stopping import Stopping
from twotower.decoding.unmasking import Blocks, StepParams

VOCAB, SIZE = 11, 6


def _prefix(words: Sequence[Sequence[int]], answer: Sequence[int] = (), room: int = 100) -> CertainPrefix:
    stopping = Stopping(DecodingParams(Mode.DIFFUSION, 100, stop_token_ids=(9,)), EOS)
    prefix = CertainPrefix(Language(words), stopping, answer)
    prefix.begin_block(room)
    return prefix


def _may(prefix: CertainPrefix) -> tuple[int, set[int]] | None:
    allowed = prefix.allowed
    return None if allowed is None else (allowed.place, {token for token in range(VOCAB) if token in allowed})


def _extended(prefix: CertainPrefix, tokens: Sequence[int]) -> int | None:
    """By a block of these; MASK is still masked."""
    block = [*tokens, *[MASK] * (SIZE - len(tokens))]
    return prefix.extend(block, [token == MASK for token in block])


def test_it_grows_by_what_is_fixed_in_front_of_the_first_mask() -> None:
    prefix = _prefix([(4, 5, 6), (4, 7)])
    assert _may(prefix) == (0, {4})
    assert _extended(prefix, [MASK, 5, 8]) is None and _may(prefix) == (0, {4})
    assert _extended(prefix, [4, MASK, 8]) is None and _may(prefix) == (1, {5, 7})
    assert _extended(prefix, [4, 7, MASK]) is None and _may(prefix) == (2, {EOS})


def test_the_first_token_that_breaks_the_grammar_is_told_and_all_in_front_of_it_stand() -> None:
    prefix = _prefix([(4, 5, 6)])
    assert _extended(prefix, [4, 5, 8, 8]) == 2
    assert _may(prefix) == (2, {6}), "no token is taken back"
    assert _extended(prefix, [4, 5, 6, EOS]) is None


def test_behind_the_end_anything_may_come() -> None:
    for words, end in (([(4,)], [4, EOS]), ([(4, 9, 5)], [4, 9])):  # 9 is the request's own stop token
        prefix = _prefix(words)
        assert _extended(prefix, [*end, 8, 8]) is None and _may(prefix) is None and prefix.fault is None
        prefix.begin_block(10)
        assert _may(prefix) is None


def test_so_it_may_behind_the_last_token_that_the_answer_takes() -> None:
    prefix = _prefix([(4, 5, 6, 7)], room=2)
    assert _extended(prefix, [4, 5, 8, 8]) is None and _may(prefix) is None


def test_the_next_block_goes_on_and_so_does_an_answer_begun_elsewhere() -> None:
    prefix = _prefix([(4, 5, 6, 7, 8, 10, 4)])
    assert _extended(prefix, [4, 5, 6, 7, 8, 10]) is None
    prefix.begin_block(10)
    assert _may(prefix) == (0, {4})
    assert _may(_prefix([(4, 5, 6)], [4, 5])) == (0, {6})


def test_where_no_token_may_come_it_says_why() -> None:
    assert _prefix([(4, 5)], [5]).fault == "dead end"
    prefix = _prefix([(4, MASK)])
    assert _extended(prefix, [4]) is None
    assert prefix.fault is not None and "only the mask token" in prefix.fault
    assert _prefix([(MASK,), (4,)]).fault is None


def test_a_step_keeps_to_it_at_that_position_alone_and_does_not_hide_a_nan() -> None:
    bits = Allowed(1, Language([(4,), (5,)]).masks((), 0, 1)[0])
    logits = torch.zeros(3, 2, VOCAB)
    logits[:, :, 8] = 9.0
    logits[:, :, 5] = 1.0
    free, kept = StepParams(0.0, 1), StepParams(0.0, 1, allowed=bits)
    hot = StepParams(0.0, 1, 1000.0, 3, bits)
    blocks = Blocks([[MASK] * 2] * 3, [[True] * 2] * 3, [free, kept, hot])
    assert not blocks.plain and Blocks([[MASK]], [[True]], [free]).plain
    plain, restricted, drawn = decide(logits.clone(), blocks)
    assert plain.tokens == [8, 8] and restricted.tokens == [8, 5] and drawn.tokens[1] in (4, 5)
    assert restricted.confidence[1] > 0.7 and restricted.finite
    for broken in (torch.nan, torch.inf):
        logits[1, 1, 8] = broken  # of a token that may not come
        assert [one.finite for one in decide(logits.clone(), blocks)] == [True, False, True]
