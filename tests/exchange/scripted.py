"""A context engine without a tower: what it "reads" becomes numbers that anybody can compute again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from twotower.config import ModelConfig
from twotower.errors import TwoTowerError
from twotower.exchange.protocol import Command, Commit, Delta, Failed, Port, Prefill, Release, Released, Reply
from twotower.model.cache import Span, TowerCache

CONFIG = ModelConfig(
    hybrid_override_pattern="M*M*",
    hidden_size=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    n_groups=2,
    ssm_state_size=16,
)


def new_cache(slots: int = 8, pages: int = 64, config: ModelConfig = CONFIG) -> TowerCache:
    return TowerCache(config, slots, pages, torch.device("cpu"), torch.float32)


def state_after(cache: TowerCache, sequence: int, length: int) -> list[Tensor]:
    """The delta [0, length) of a sequence, as a scripted engine with a cache of this shape makes it."""
    keys, values, conv, ssm = [torch.zeros(shape, dtype=dtype) for shape, dtype in cache.delta_shapes(length, 1)]
    for position in range(length):
        key, value, conv, ssm = _state_at(sequence, position, tuple(cache.delta_shapes(1, 1)))
        keys[:, position], values[:, position] = key[:, 0], value[:, 0]
    return [keys, values, conv, ssm]


@lru_cache(maxsize=10000)
def _state_at(
    sequence: int, position: int, shapes: tuple[tuple[torch.Size, torch.dtype], ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(sequence * 10007 + position)
    key, value, conv, ssm = (torch.randn(shape, generator=random, dtype=dtype) for shape, dtype in shapes)
    return key, value, conv, ssm


def mirrored(cache: TowerCache, slot: int) -> list[Tensor]:
    return cache.delta([Span(slot, 0, cache.length(slot))])


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@dataclass
class ScriptedContext:
    """Answers every command at once: with what `failures` holds for its sequence, else as a context engine would.

    Prompts are read in chunks of `chunk` positions.
    """

    port: Port
    cache: TowerCache
    chunk: int = 16
    histories: dict[int, list[int]] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)
    failures: dict[int, TwoTowerError] = field(default_factory=dict)

    def tick(self) -> None:
        replies: list[Reply] = []
        for command in self.port.receive():
            try:
                replies += self.answer(command)
            except TwoTowerError as error:
                replies.append(Failed(command.sequence, error))
        self.port.send(replies)

    def answer(self, command: Command) -> list[Reply]:
        sequence = command.sequence
        if sequence in self.failures:
            raise self.failures.pop(sequence)
        if isinstance(command, Release):
            self.histories.pop(sequence, None)
            if sequence in self.slots:
                self.cache.free(self.slots.pop(sequence))
            return [Released(sequence)]
        if isinstance(command, Prefill):
            self.open(sequence, command.reserve)
            return self._prefill(sequence, command.token_ids)
        assert isinstance(command, Commit)
        return [self.read(sequence, command.token_ids)]

    def open(self, sequence: int, reserve: int) -> None:
        self.slots[sequence] = self.cache.allocate(reserve)
        self.histories[sequence] = []

    def read(self, sequence: int, token_ids: Sequence[int], complete: bool = True) -> Delta:
        slot, start = self.slots[sequence], len(self.histories[sequence])
        self.histories[sequence] += token_ids
        end = len(self.histories[sequence])
        keys, values, conv, ssm = state_after(self.cache, sequence, end)
        self.cache.apply([Span(slot, start, end)], [keys[:, start:], values[:, start:], conv, ssm])
        return Delta(sequence, start, end, slot, complete)

    def _prefill(self, sequence: int, token_ids: Sequence[int]) -> list[Reply]:
        starts = range(0, max(len(token_ids), 1), self.chunk)
        last = starts[-1]
        return [self.read(sequence, token_ids[s : s + self.chunk], complete=s == last) for s in starts]
