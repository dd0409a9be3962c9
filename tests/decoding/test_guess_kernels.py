"""When the kernel for guesses is taken, and that a step gives it what it wants. The kernel itself: tests/kernels."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.goldens import CPU, golden
from twotower.decoding import guess_kernels
from twotower.decoding.guess_kernels import Guess, choose, plain
from twotower.decoding.guesses import Draw
from twotower.decoding.unmasking import Blocks, StepParams
from twotower.engine import passes
from twotower.engine.passes import EagerPasses
from twotower.model.cache import TowerCache


def fused(logits_PV: Tensor, mask_token_id: int, draw: Draw | None) -> Tensor:
    """Stands in for the kernel: any dtype, and the logits stay as they are."""
    return plain(logits_PV.to(torch.float32, copy=True), mask_token_id, draw)


def _chosen(monkeypatch: pytest.MonkeyPatch, guess: Guess) -> tuple[Guess, str]:
    """As on a GPU, compared on the CPU."""
    compared = guess_kernels.deviations
    monkeypatch.setattr(
        guess_kernels, "deviations", lambda guess, vocab, *_: compared(guess, vocab, CPU, torch.float32)
    )
    return choose(64, CPU, torch.float32, lambda _: SimpleNamespace(guess=guess))  # type: ignore[arg-type, return-value]


def test_one_that_agrees_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _chosen(monkeypatch, fused) == (fused, "triton (agrees with torch here)")


@pytest.mark.parametrize("column", range(4))
def test_one_that_differs_is_declined(monkeypatch: pytest.MonkeyPatch, column: int) -> None:
    def wrong(logits_PV: Tensor, mask_token_id: int, draw: Draw | None) -> Tensor:
        guesses_P4 = fused(logits_PV, mask_token_id, draw)
        guesses_P4[:, column] += 10
        return guesses_P4

    guess, why = _chosen(monkeypatch, wrong)
    assert guess is plain and why.startswith("torch (triton differs from torch by ")


def test_one_that_misses_what_is_not_finite_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(logits_PV: Tensor, mask_token_id: int, draw: Draw | None) -> Tensor:
        return fused(logits_PV, mask_token_id, draw).nan_to_num()

    assert "what is not finite" in _chosen(monkeypatch, blind)[1]


def test_one_that_does_not_run_is_declined() -> None:
    def load(_: str) -> Any:
        raise ModuleNotFoundError("no triton")

    assert choose(64, CPU, torch.float32, load) == (plain, "torch (triton failed: ModuleNotFoundError)")


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_a_step_gives_a_kernel_what_the_head_makes(no_grad: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = golden("tt_dense").denoiser
    cache = TowerCache(tower.config, 2, 8, CPU, torch.float32)
    slots = [cache.allocate(32), cache.allocate(32)]
    rows = [StepParams(0.3, 4), StepParams(0.3, 4, 0.7, 5)]
    blocks = Blocks([[3] * 16] * 2, [[place % 3 > 0 for place in range(16)]] * 2, rows)
    eager = EagerPasses(tower, cache)
    wanted = eager.step(slots, blocks)
    given: list[Tensor] = []

    def seen(logits_PV: Tensor, mask_token_id: int, draw: Draw | None) -> Tensor:
        given.append(logits_PV)
        return fused(logits_PV, mask_token_id, draw)

    monkeypatch.setattr(passes, "guess_of", lambda _: seen)
    assert torch.equal(eager.step(slots, blocks), wanted)
    assert [len(logits) for logits in given] == [10, 10] and all(each.dtype is tower.dtype for each in given)
