"""How much a tower process is going to allocate, worked out before it does: the same objects, on the meta device."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.config import ModelConfig
from twotower.engine.settings import EngineSettings
from twotower.exchange.protocol import Delta
from twotower.exchange.settings import LinkSettings
from twotower.exchange.staging import DeltaLayout, fitted
from twotower.model.cache import TowerCache
from twotower.model.loading import materialise
from twotower.model.pages import PAGE_TOKENS
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.validation import MAX_BLOCK

_META = torch.device("meta")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the tensors a tower process keeps, and the sequences and positions that its cache or mirror holds.

    `slots` are conv windows and SSM states, `pages` keys and values, `staging` the buffers of its links once they have
    grown as far as they can. What a forward pass needs for a moment is not counted.
    """

    sequences: int
    tokens: int
    weights: int
    slots: int
    pages: int
    staging: int
    scratch: int

    @property
    def total(self) -> int:
        return self.weights + self.slots + self.pages + self.staging + self.scratch

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_readable(getattr(self, name))}" for name in self.__slots__[2:])
        return f"{self.sequences} sequences and {self.tokens} tokens fit; {_readable(self.total)}: {parts}"


def memory_of(
    config: ModelConfig,
    settings: EngineSettings,
    dtype: torch.dtype,
    towers: Sequence[type[ContextTower] | type[DenoiserTower]],
    num_links: int = 0,
    link: LinkSettings | None = None,
) -> Memory:
    """The memory of a process that hosts these towers over one cache (or mirror) and `num_links` ends of links."""
    cache = TowerCache(config, settings.max_sequences, settings.pages, _META, dtype)
    link = link or fitted(LinkSettings(), cache)
    return Memory(
        sequences=settings.max_sequences,
        tokens=settings.pages * PAGE_TOKENS,
        weights=sum(_weights(tower, config, dtype) for tower in towers),
        slots=_bytes([cache.conv, cache.ssm]),
        pages=_bytes([cache.keys, cache.values]),
        staging=num_links * link.staging_buffers * _staging_buffer(cache, settings, link),
        scratch=cache.positions(0).untyped_storage().nbytes(),
    )


def _weights(tower: type[ContextTower] | type[DenoiserTower], config: ModelConfig, dtype: torch.dtype) -> int:
    with _META:
        built = tower(config)
    materialise(built, _META, dtype)
    return _bytes([*built.parameters(), *built.buffers()])


def _staging_buffer(cache: TowerCache, settings: EngineSettings, link: LinkSettings) -> int:
    """A buffer grows to the largest single delta: a prompt chunk's or a block's, with the states."""
    longest = min(max(settings.prefill_chunk_tokens, MAX_BLOCK), settings.max_sequence_length)
    largest = DeltaLayout(cache, link.ssm_wire_dtype).nbytes([Delta(0, 0, longest, 0)])
    return max(link.staging_bytes, largest)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _readable(nbytes: float) -> str:
    unit = 0
    while nbytes >= 1024 and unit < len(_UNITS) - 1:
        nbytes, unit = nbytes / 1024, unit + 1
    return f"{nbytes:.1f} {_UNITS[unit]}" if unit else f"{nbytes:.0f} B"
