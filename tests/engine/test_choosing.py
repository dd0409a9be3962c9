"""Which mode is fastest, by numbers alone."""

import pytest

from twotower.core import Mode
from twotower.engine.modes.choosing import Costs, Signs, fastest, loss_s, paces

CAUSAL = (Mode.AR, Mode.VERIFIED)
SMALL = Costs(step=0.013, read=0.011, token=0.006)  # one row of the demo on a CPU
LARGE = Costs(step=0.070, read=0.100, token=0.016)  # 64 rows


@pytest.mark.parametrize(
    ("costs", "accepted", "best"),
    [
        (SMALL, 15, Mode.VERIFIED),
        (SMALL, 6, Mode.VERIFIED),
        (SMALL, 5, Mode.AR),  # 37 ms a round: six tokens are no more than ar has in that time
        (SMALL, 0, Mode.AR),
        (LARGE, 15, Mode.VERIFIED),
        (LARGE, 13, Mode.AR),
    ],
)
def test_drafts_pay_where_their_tokens_come_faster(costs: Costs, accepted: float, best: Mode) -> None:
    assert fastest(paces(costs, Signs(2, accepted)), CAUSAL) is best


def test_several_rows_over_two_devices_go_at_the_slower_ones_pace() -> None:
    apart = Costs(step=0.01, read=0.03, token=0.01, apart=True)
    assert apart.round_s(2) == 0.03 and Costs(0.01, 0.03, 0.01).round_s(2) == pytest.approx(0.05)
    assert apart.round_s(4) == pytest.approx(0.04)
    signs = Signs(2, 3)
    assert fastest(paces(apart, signs), CAUSAL) is Mode.VERIFIED
    assert fastest(paces(Costs(0.01, 0.03, 0.01), signs), CAUSAL) is Mode.AR


def test_diffusion_is_one_of_them_where_its_blocks_are_known_and_it_is_allowed() -> None:
    signs = Signs(2, 10, 3, 16)
    assert Mode.DIFFUSION not in paces(SMALL, Signs(2, 10))
    found = paces(SMALL, signs)
    assert found[Mode.DIFFUSION] == pytest.approx(16 / (3 * 0.013 + 0.011))
    assert paces(SMALL, Signs(2, 10, 3, 16, 0.5))[Mode.DIFFUSION] == pytest.approx(16 / (3 * 0.013 + 0.0055))
    assert fastest(found, Mode) is Mode.DIFFUSION and fastest(found, CAUSAL) is Mode.VERIFIED


def test_of_equals_the_first_is_taken() -> None:
    assert fastest({Mode.AR: 1.0, Mode.VERIFIED: 1.0}, CAUSAL) is Mode.AR


@pytest.mark.parametrize(("pace", "best"), [(0.5, Mode.VERIFIED), (1.1, Mode.VERIFIED), (1.4, Mode.AR)])
def test_what_is_hardly_faster_is_no_reason_to_change(pace: float, best: Mode) -> None:
    assert fastest({Mode.AR: pace, Mode.VERIFIED: 1.0}, CAUSAL, now=Mode.VERIFIED, times=1.3) is best


def test_what_a_try_loses() -> None:
    assert loss_s(SMALL, SMALL, 1, Signs(2, 0)) == pytest.approx(0.037 - 0.006)
    assert loss_s(SMALL, LARGE, 64, Signs(2, 3)) == pytest.approx(0.037 - 4 * 0.016 / 64), "all others wait for it"
    assert loss_s(SMALL, SMALL, 1, Signs(2, 15)) == pytest.approx(0.25 * 0.037), "though it seems to lose nothing"
