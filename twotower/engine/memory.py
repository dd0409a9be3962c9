"""How much a tower process is going to allocate, worked out before it does: the same objects, on the meta device."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.config import ModelConfig
from twotower.engine.graphs import power_of_two
from twotower.engine.passing import captured_bytes, passing_bytes
from twotower.engine.settings import EngineSettings, PrefixMemory
from twotower.exchange.protocol import Delta
from twotower.exchange.settings import LinkSettings
from twotower.exchange.staging import DeltaLayout, fitted
from twotower.model.cache import TowerCache, state_bytes
from twotower.model.loading import materialise
from twotower.model.pages import page_tokens_on
from twotower.model.tower import ContextTower, DenoiserTower

_META = torch.device("meta")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the tensors a tower process keeps, and the sequences and positions that its cache or mirror holds.

    `slots` are conv windows and SSM states, `pages` keys and values. `staging` is the buffers of its links at their
    largest. `scratch` is constants, and what links need to round states. `prefixes` is the states that the context
    tower keeps. `total` is the sum of these and `weights`. `passing` comes on top: the temporary memory of the largest
    pass, that of captured passes on a GPU, and that of penalties in all sequences. All of this is on the process's
    device. `host` is the pinned host memory that a process with a GPU uses instead: its prefixes.
    """

    sequences: int
    tokens: int
    weights: int
    slots: int
    pages: int
    staging: int
    scratch: int
    prefixes: int = 0
    passing: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.slots + self.pages + self.staging + self.scratch + self.prefixes

    @property
    def parts(self) -> dict[str, int]:
        """Bytes on the device by name, `passing` included."""
        return {name: getattr(self, name) for name in self.__slots__[2:-1]}

    def __str__(self) -> str:
        *kept, passing = (f"{name} {_readable(nbytes)}" for name, nbytes in self.parts.items())
        fit = f"{self.sequences} sequences and {self.tokens} tokens fit"
        host = f"; on the host prefixes {_readable(self.host)}" if self.host else ""
        return f"{fit}; {_readable(self.total)}: {', '.join(kept)}; beside it {passing}{host}"


def together(memories: Sequence[Memory]) -> Memory:
    """The memory of processes that share one device."""
    sums = {name: sum(memory.parts[name] for memory in memories) for name in memories[0].parts}
    return Memory(memories[0].sequences, memories[0].tokens, **sums, host=sum(memory.host for memory in memories))


def memory_of(
    config: ModelConfig,
    settings: EngineSettings,
    dtype: torch.dtype,
    towers: Sequence[type[ContextTower] | type[DenoiserTower]],
    num_links: int = 0,
    link: LinkSettings | None = None,
    on_gpu: bool = False,
) -> Memory:
    """The memory of a process that hosts these towers over one cache (or mirror) and `num_links` ends of links."""
    captured = captured_bytes(config, settings, dtype, towers) if on_gpu and settings.capture == "on" else 0
    page_tokens = page_tokens_on("cuda" if on_gpu else "cpu")
    pages = settings.pages_of(page_tokens)
    snapshots = settings.snapshots(state_bytes(config, dtype), page_tokens) if ContextTower in towers else 0
    cache = TowerCache(config, settings.max_sequences, pages, _META, dtype, snapshots, page_tokens)
    link = link or fitted(LinkSettings(), cache, settings.longest_delta)
    on_host = on_gpu and settings.prefix_cache_in == PrefixMemory.HOST
    return Memory(
        sequences=settings.max_sequences,
        tokens=pages * page_tokens,
        weights=sum(_weights(tower, config, dtype) for tower in towers),
        slots=_bytes([cache.conv, cache.ssm]),
        pages=_bytes([cache.keys, cache.values]),
        staging=num_links * link.staging_buffers * _staging_buffer(cache, settings, link),
        prefixes=0 if on_host else cache.snapshots.nbytes,
        scratch=cache.positions(0).untyped_storage().nbytes() + (_rounding(cache, settings, link) if num_links else 0),
        passing=passing_bytes(config, settings, dtype, towers, on_gpu) + captured + _steering(config, settings, towers),
        host=sum(map(_pinned, (cache.snapshots.conv, cache.snapshots.ssm))) if on_host else 0,
    )


def _steering(
    config: ModelConfig, settings: EngineSettings, towers: Sequence[type[ContextTower] | type[DenoiserTower]]
) -> int:
    """For each sequence, how often the answer has each token, in fp32, and a byte for whether the prompt has it."""
    return settings.max_sequences * config.vocab_size * 5 if ContextTower in towers else 0


def _weights(tower: type[ContextTower] | type[DenoiserTower], config: ModelConfig, dtype: torch.dtype) -> int:
    with _META:
        built = tower(config)
    materialise(built, _META, dtype)
    return _bytes([*built.parameters(), *built.buffers()])


def _staging_buffer(cache: TowerCache, settings: EngineSettings, link: LinkSettings) -> int:
    """A buffer grows to the largest single delta: a prompt chunk's or a block's, with the states."""
    largest = DeltaLayout(cache, link.ssm_wire_dtype).nbytes([Delta(0, 0, settings.longest_delta, 0)])
    return max(link.staging_bytes, largest)


def _rounding(cache: TowerCache, settings: EngineSettings, link: LinkSettings) -> int:
    """States that are rounded on the wire are copied in fp32 first, all of a message together, one link at a time."""
    if link.ssm_wire_dtype == str(cache.ssm.dtype).removeprefix("torch."):
        return 0
    least = DeltaLayout(cache, link.ssm_wire_dtype).nbytes([Delta(0, 0, 1, 0)])
    together = min(settings.max_sequences, max(1, link.staging_bytes // least))
    return together * cache.ssm[:, 0].nbytes


def _pinned(tensor: Tensor) -> int:
    """torch's allocator of pinned memory takes the next power of two."""
    return power_of_two(tensor.nbytes) if tensor.nbytes else 0


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _readable(nbytes: float) -> str:
    unit = 0
    while nbytes >= 1024 and unit < len(_UNITS) - 1:
        nbytes, unit = nbytes / 1024, unit + 1
    return f"{nbytes:.1f} {_UNITS[unit]}" if unit else f"{nbytes:.0f} B"
