"""The experiment with a check of blocks: without one it is the naive loop, and what a check costs is counted."""

from benchmarks.verify_threshold import AR, CheckedLoop, Found, Tried, Way, render
from tests.goldens import MODELS, golden
from twotower.core import DecodingParams, Mode, Request, RequestId

ALL = 1.1  # no token is so likely


def test_checks_share_a_block_and_count_their_own_passes() -> None:
    model = golden(MODELS[0])
    loop = CheckedLoop(model.context, model.denoiser)
    params = DecodingParams(max_new_tokens=24, block_size=8, confidence_threshold=0.02)
    request = Request(RequestId("r"), (5, 9, 11), params)
    blocks = list(loop.generate(request))
    assert len(blocks) == 3, "no EOS, which would end it"
    (tokens, plain), (same, none), (again, every) = loop.checked(request, [None, 0.0, ALL])
    assert tokens == same == again == [token for block in blocks for token in block.token_ids]
    steps = sum(block.num_steps for block in blocks)
    assert plain == Found(denoiser=steps, context=2, blocks=3)
    assert none == Found(denoiser=steps, context=3, blocks=3), "the last block is read, too"
    assert every == Found(denoiser=2 * steps, context=5, blocks=3, masked_again=3), "all decided twice, and alike"


def test_the_report_says_what_beats_a_check() -> None:
    found = {
        Tried(AR): Found(10, 10, 100, 0, 100, 100),
        Tried(Way(Mode.VERIFIED)): Found(10, 10, 100, 10, 10, 10),
        Tried(Way(Mode.DIFFUSION, 0.5)): Found(8, 10, 100, 5, 5, 10),
        Tried(Way(Mode.DIFFUSION, 0.5), 0.3): Found(9, 10, 100, 8, 12, 10, 3),
    }
    rows = [line for line in render(found).splitlines() if line.startswith("| ")]
    assert rows[-1] == "| diffusion 0.5 | 0.3 | 90.0% | 12.50 | 5.00 | 30.0% | verified |"
    assert rows[2].startswith("| ar | – | 100.0% | – | 1.00 |")
