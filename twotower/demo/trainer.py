"""The training loop of both stages, resumable at any train step. Knows nothing about the command line.

Batches and masks are functions of (seed, stage, step). So only weights, optimizer state and position are saved. The
file is replaced atomically.
"""

from __future__ import annotations

import copy
import logging
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as BpeTokenizer
from torch import Tensor, nn
from tqdm import tqdm

from twotower.config import ModelConfig
from twotower.demo.balance import ExpertBalance
from twotower.demo.batches import block_batch, causal_batches, next_token_batch, on, training_instances
from twotower.demo.earlier import Earlier
from twotower.demo.initialise import new_context_tower, new_denoiser_tower
from twotower.demo.objectives import context_loss, denoiser_loss, mock_ar_loss
from twotower.demo.optimizer import TowerOptimizer
from twotower.demo.recipe import STAGES, Recipe, Stage, StageRecipe
from twotower.errors import CheckpointError
from twotower.model.tower import DenoiserTower, Tower

STATE_FILE = "training.pt"
# The largest below 2**63: the remainder of a text depends on all of it, not only on its end.
_PRIME = 2**63 - 25
_CPU = torch.device("cpu")
# Of the scan in training. A matter of speed: a chunk costs its square, and a short one its own few calls.
_CHUNK = 16
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LogEntry:
    """The loss at one train step, and the seconds since the entry before."""

    stage: Stage
    step: int
    loss: float
    seconds: float


class Trainer:
    """Trains the context tower, freezes it, then trains the denoiser that started as its copy. Where the run goes on
    from an earlier checkpoint, both start as that one's.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: BpeTokenizer,
        output: Path,
        device: torch.device = _CPU,
        earlier: Earlier | None = None,
    ) -> None:
        self.recipe, self.tokenizer, self.output, self.device = recipe, tokenizer, output, device
        self.stage: Stage = "context"
        self.step = 0
        self.history: list[LogEntry] = []
        # Drawn on the CPU, so that a seed gives the same weights everywhere.
        config = ModelConfig.from_dict({**recipe.config, "chunk_size": _CHUNK})
        self.context = new_context_tower(config, self._generator("init")).to(self.device)
        self.denoiser: DenoiserTower | None = None
        self._earlier_denoiser: dict[str, Tensor] | None = None
        if earlier is not None:
            self.context.load_state_dict(earlier.context)
            self._earlier_denoiser = earlier.denoiser
        self._start(self.context)

    def run(self, save_every: int = 500, stop_after: int | None = None) -> None:
        """Train to the end of the recipe, or `stop_after` train steps from here; saves on the way and at the end."""
        total = sum(self.recipe.stage(stage).train_steps for stage in STAGES)
        with tqdm(total=total, initial=self._steps_done(), unit="step", dynamic_ncols=True) as bar:
            while not self.finished and (stop_after is None or bar.n - bar.initial < stop_after):
                self._advance_stage()
                loss = self._train_step()
                bar.set_postfix_str(f"{self.stage} loss {loss:.4f}", refresh=False)
                bar.update()
                self._note(loss)
                if self.step % save_every == 0:
                    self.save()
        self.save()

    @property
    def finished(self) -> bool:
        """Whether both stages are through."""
        return self.stage == STAGES[-1] and self.step >= self.recipe.stage(self.stage).train_steps

    def save(self) -> None:
        """Write everything a resumed run needs, atomically."""
        state = {
            "stage": self.stage,
            "step": self.step,
            "history": [asdict(entry) for entry in self.history],
            "context": self.context.state_dict(),
            "denoiser": None if self.denoiser is None else self.denoiser.state_dict(),
            "earlier_denoiser": self._earlier_denoiser,
            "optimizer": self._optimizer.state(),
            "recipe": asdict(self.recipe),
            "versions": versions(),
        }
        partial = self.output / f"{STATE_FILE}.partial"
        torch.save(state, partial)
        os.replace(partial, self.output / STATE_FILE)

    def resume(self) -> None:
        """Continue from the saved state of `output`.

        Raises CheckpointError where there is none, or where it is of another recipe. Only the numbers of train steps
        may differ: the schedule follows them, so the run is one that was always to have so many.
        """
        state = _saved(self.output)
        _compare(state["recipe"], self.recipe)
        if state["versions"] != versions():
            _logger.warning("begun with %s, goes on with %s", state["versions"], versions())
        self.context.load_state_dict(state["context"])
        self.stage, self.step = state["stage"], state["step"]
        self.history = [LogEntry(**entry) for entry in state["history"]]
        self._earlier_denoiser = state["earlier_denoiser"]
        self._balance.close()
        if state["denoiser"] is not None:
            self.context.requires_grad_(False)
            self.denoiser = self._new_denoiser()
            self.denoiser.load_state_dict(state["denoiser"])
        self._start(self._trained)
        self._optimizer.load(state["optimizer"])
        _logger.info("resumed the %s stage at train step %d", self.stage, self.step)

    @property
    def _trained(self) -> Tower:
        return self.context if self.denoiser is None else self.denoiser

    def _start(self, tower: Tower) -> None:
        self._balance = ExpertBalance(tower, self.recipe.balance_rate)
        stage = self.recipe.stage(self.stage)
        self._optimizer = TowerOptimizer(tower, stage.muon_rate, stage.adam_rate, self.recipe.weight_decay)
        self._since = time.monotonic()

    def _advance_stage(self) -> None:
        if self.stage == "context" and self.step >= self.recipe.context.train_steps:
            self.stage, self.step = "denoiser", 0
            self.context.requires_grad_(False)
            self._balance.close()
            self.denoiser = self._new_denoiser()
            self._start(self.denoiser)

    def _train_step(self) -> float:
        stage = self.recipe.stage(self.stage)
        loss = self._loss(stage.batch_size)
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained.parameters(), 1.0)
        self._optimizer.step(stage.rate_at(self.step))
        self._balance.update()
        self.step += 1
        return loss.item()

    def _loss(self, batch_size: int) -> Tensor:
        instances = training_instances(self.recipe.seed, self.stage, self.step, batch_size)
        if self.denoiser is None:
            batches = causal_batches(self.tokenizer, instances)
            return context_loss(self.context, [on(batch, self.device) for batch in batches])
        batch = on(block_batch(self.tokenizer, instances), self.device)
        masks = self._generator(f"masks/{self.step}")
        loss = denoiser_loss(self.context, self.denoiser, batch, masks)
        if self.recipe.mock_ar_every and self.step % self.recipe.mock_ar_every == 0:
            cuts = next_token_batch(self.tokenizer, instances, self._generator(f"cuts/{self.step}"))
            loss = loss + mock_ar_loss(self.context, self.denoiser, on(cuts, self.device))
        return loss

    def _generator(self, purpose: str) -> torch.Generator:
        seed = f"{self.recipe.seed}/{purpose}".encode()
        return torch.Generator().manual_seed(int.from_bytes(seed, "big") % _PRIME)

    def _new_denoiser(self) -> DenoiserTower:
        context = copy.deepcopy(self.context).cpu()
        denoiser = new_denoiser_tower(context, self._generator("denoiser"))
        if self._earlier_denoiser is not None:
            denoiser.load_state_dict(self._earlier_denoiser)
        return denoiser.to(self.device)

    def _steps_done(self) -> int:
        return self.step + (self.recipe.context.train_steps if self.stage == "denoiser" else 0)

    def _note(self, loss: float) -> None:
        """Keep every hundredth train step's loss, and each stage's last."""
        if self.step % 100 and self.step != self.recipe.stage(self.stage).train_steps:
            return
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        self.history.append(LogEntry(self.stage, self.step, round(loss, 5), round(seconds, 1)))


def saved_recipe(output: Path) -> Recipe:
    """The recipe of the run that `output` holds. Raises CheckpointError."""
    saved = _saved(output)["recipe"]
    return Recipe(**{**saved, **{stage: StageRecipe(**saved[stage]) for stage in STAGES}})


def _saved(output: Path) -> dict[str, Any]:
    path = output / STATE_FILE
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, so nothing to resume") from None
    return state


def _compare(saved: dict[str, Any], recipe: Recipe) -> None:
    ours = asdict(recipe)
    for stage in STAGES:
        saved = {**saved, stage: {**saved[stage], "train_steps": ours[stage]["train_steps"]}}
    for name in ours:
        if saved.get(name) != ours[name]:
            raise CheckpointError(f"cannot resume: {name} was {saved.get(name)}, now it is {ours[name]}")


def versions() -> dict[str, str]:
    """What the run depends on beside this code."""
    return {"python": platform.python_version(), "torch": str(torch.__version__)}
