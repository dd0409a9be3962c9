"""What is done to trained weights before they are shipped."""

from typing import Any

import torch

from twotower.config import ModelConfig
from twotower.demo.initialise import new_context_tower, new_denoiser_tower
from twotower.demo.ship import tempered


@torch.no_grad()
def test_a_tempered_denoiser_predicts_the_same_less_confidently(tiny_config: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    denoiser = new_denoiser_tower(new_context_tower(ModelConfig.from_dict(tiny_config), generator), generator)
    hidden_RD = torch.randn(50, denoiser.config.hidden_size, generator=generator)
    before = denoiser.logits(hidden_RD)
    after = tempered(denoiser, 2.0).logits(hidden_RD)
    torch.testing.assert_close(after, before / 2)
    assert torch.equal(denoiser.logits(hidden_RD), before), "the trained tower itself is left alone"
