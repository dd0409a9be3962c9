"""How fast each mode can become on a device if only its passes take time."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from twotower.config import ModelConfig
from twotower.engine.settings import EngineSettings
from twotower.exchange.protocol import Delta
from twotower.exchange.staging import DeltaLayout
from twotower.model.cache import TowerCache
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.planner.devices import BLOCK, Assumed, Device
from twotower.planner.passes import Batch, Cost, Kind, Touched, cost, kv_bytes, state_bytes
from twotower.planner.routing import touched_by
from twotower.planner.weights import Weights, weights_of

MOST_DENOISERS = 8
_ROUNDING = {"float32": (0, 0), "bfloat16": (1.5, 1.5), "int8": (6.25, 1.25), "float8_e4m3fn": (4.25, 3.25)}
"""How often fp32 states are moved to be rounded for the wire, and on the other side to be fp32 again: our operations,
each reading and writing, beyond the copies that float32 needs, too."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens a second of a cell of so many devices; `fits`: whether its sequences have room there."""

    tokens: float
    devices: int
    denoisers: int = 0
    fits: bool = True

    @property
    def per_device(self) -> float:
        return self.tokens / self.devices


@dataclass(frozen=True)
class Planner:
    """One checkpoint in bf16, with experts in `config.experts`, on devices of one kind. `routing`: one of ROUTINGS."""

    config: ModelConfig
    device: Device
    assumed: Assumed = field(default_factory=Assumed)
    routing: str = "uniform"

    @cached_property
    def touched(self) -> Touched:
        """How many experts a pass touches. Raises ConfigError for an unknown routing."""
        return touched_by(self.routing, self.config)

    @cached_property
    def context(self) -> Weights:
        return weights_of(ContextTower, self.config, torch.bfloat16)

    @cached_property
    def denoiser(self) -> Weights:
        return weights_of(DenoiserTower, self.config, torch.bfloat16)

    @cached_property
    def block_on_the_wire(self) -> int:
        """Bytes that the context tower sends to a denoiser for each block that is committed."""
        cache = TowerCache(self.config, 1, 1, torch.device("meta"), torch.bfloat16)
        return DeltaLayout(cache, self.assumed.ssm_wire_dtype).nbytes([Delta(0, 0, BLOCK, 0)])

    def cost(self, kind: Kind, rows: int, context: int, touched: Touched | None = None) -> Cost:
        """Of one pass over a block a row; one position in an `ar` step, as many as the engine reads at once of a
        prompt. `touched`: other routing than the planner's."""
        weights = self.denoiser if kind is Kind.DENOISE else self.context
        return cost(kind, self.config, weights, self.batch(kind, rows, context), touched or self.touched)

    def seconds(self, kind: Kind, rows: int, context: int) -> float:
        return self.cost(kind, rows, context).seconds(self.device, self.assumed.reached)

    def batch(self, kind: Kind, rows: int, context: int) -> Batch:
        """What one pass holds."""
        width = {Kind.STEP: 1, Kind.PREFILL: EngineSettings().prefill_chunk_tokens}.get(kind, BLOCK)
        return Batch(rows, context, width)

    def sequences(self, context: int, towers: int) -> int:
        """How many sequences of `context` tokens fit beside the weights of so many towers; 0 if the
        weights do not fit.
        """
        room = self.device.memory * (1 - self.assumed.kept_free)
        room -= self.context.total + (self.denoiser.total if towers > 1 else 0)
        return max(0, int(room // (state_bytes(self.config) + context * kv_bytes(self.config))))

    def ar(self, rows: int, context: int) -> Rate:
        return Rate(rows / self.seconds(Kind.STEP, rows, context), 1, fits=rows <= self.sequences(context, 1))

    def diffusion(self, rows: int, context: int, denoisers: int) -> Rate:
        """`rows` a denoiser; no denoiser: both towers on one device, in turn."""
        steps = max(1.0, BLOCK / self.assumed.tokens_per_step)
        return self._blocks(rows, context, denoisers, BLOCK, steps, Kind.COMMIT)

    def verified(self, rows: int, context: int, denoisers: int) -> Rate:
        """The same for rounds of a draft and its check."""
        return self._blocks(
            rows, context, denoisers, self.assumed.tokens_per_round, self.assumed.draft_steps, Kind.VERIFY
        )

    def _blocks(self, rows: int, context: int, denoisers: int, tokens: float, steps: float, read: Kind) -> Rate:
        drafting, reading = steps * self.seconds(Kind.DENOISE, rows, context), self.seconds(read, rows, context)
        if not denoisers:
            return Rate(rows * tokens / (drafting + reading), 1, fits=rows <= self.sequences(context, 2))
        rounding, back = self._rounding(rows)
        drafting, reading = drafting + back, reading + rounding
        # Towers work on different rows at the same time. The slower side, or the link of the context tower, decides.
        carried = rows * self.block_on_the_wire / self.device.link
        round_ = max(drafting, denoisers * reading, denoisers * carried)
        fits = denoisers * rows <= self.sequences(context, 1)
        return Rate(denoisers * rows * tokens / round_, denoisers + 1, denoisers, fits)

    def _rounding(self, rows: int) -> tuple[float, float]:
        """Seconds that it takes each side, for the states of so many rows."""
        seconds = rows * state_bytes(self.config) / (self.device.bandwidth * self.assumed.reached)
        before, after = _ROUNDING[self.assumed.ssm_wire_dtype]
        return before * seconds, after * seconds

    def best(self, mode: str, rows: int, context: int) -> Rate:
        """The number of denoisers a context tower, from 1 to MOST_DENOISERS, with the most tokens a second a device, if
        its sequences fit.
        """
        rate = self.diffusion if mode == "diffusion" else self.verified
        rates = [rate(rows, context, number) for number in range(1, MOST_DENOISERS + 1)]
        return max(rates, key=lambda one: (one.fits, one.per_device))
