"""The two ways to compute a mixture give the same sum, whichever the number of tokens picks."""

import pytest
import torch

from tests.goldens import vendored
from twotower.model.moe import FEW_TOKENS, Experts, MixtureOfExperts


def _experts() -> tuple[MixtureOfExperts, Experts]:
    mixture = next(m for m in vendored("tt_moe").context.modules() if isinstance(m, MixtureOfExperts))
    return mixture, mixture.experts


@torch.inference_mode()
def test_all_experts_and_chosen_experts_agree() -> None:
    mixture, experts = _experts()
    hidden_MD = torch.randn(FEW_TOKENS, experts.up_proj.shape[2], generator=torch.Generator().manual_seed(3))
    chosen_Mk, weights_Mk = mixture.gate(hidden_MD)
    every = experts._all_experts(hidden_MD, chosen_Mk, weights_Mk)
    chosen = experts._chosen_experts(hidden_MD, chosen_Mk, weights_Mk)
    assert chosen.abs().max() > 1e-3
    torch.testing.assert_close(every, chosen, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_both_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, experts = _experts()
    taken = []
    for way in ("_all_experts", "_chosen_experts"):
        monkeypatch.setattr(experts, way, lambda x, *_, way=way: taken.append(way) or x)
    for tokens in (FEW_TOKENS, FEW_TOKENS + 1):
        hidden_MD = torch.randn(tokens, experts.up_proj.shape[2])
        experts(hidden_MD, *mixture.gate(hidden_MD))
    assert taken == ["_all_experts", "_chosen_experts"]
