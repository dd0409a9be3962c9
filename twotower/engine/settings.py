"""Sizes and timeouts of a pair's engines. They are chosen at deployment and never change while a service runs.

The one declaration of each setting: a service's configuration, its checks and its docs derive from it.
"""

import math
from dataclasses import dataclass, fields
from enum import StrEnum

from twotower.core import MAX_BLOCK
from twotower.errors import ConfigError, InvalidRequest
from twotower.expert_formats import GROUPS, USUAL_GROUP, ExpertFormat, ExpertWord
from twotower.model.pages import PAGE_TOKENS, pages_for
from twotower.parameters import Choice, Integer, Number, Setting, settings_in


class Capture(StrEnum):
    """Which usual passes are kept to be replayed (`engine/capture.py`)."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class PrefixMemory(StrEnum):
    """Whose memory the states of kept prefixes are in."""

    DEVICE = "device"
    HOST = "host"


_LINK_LOW_S = 3  # a tower with nothing to say speaks every second


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Sizes in sequences and tokens, times in seconds. Raises ConfigError for a value that a setting does not take."""

    max_sequences: int = Setting(32, Integer(1), "sequences that a cell decodes at the same time").field
    max_sequence_length: int = Setting(4096, Integer(1), "tokens of a prompt and its answer together, at most").field
    cache_tokens: int = Setting(
        0,
        Integer(0),
        "positions that each tower's cache has pages for; 0: for `max_sequences` sequences of `max_sequence_length`",
    ).field
    prefill_chunk_tokens: int = Setting(512, Integer(1), "tokens of each prompt that one forward reads at most").field
    prefix_cache_bytes: int = Setting(
        1 << 30,
        Integer(0),
        "bytes of the prefix cache for Mamba states: prompts that begin like an earlier one start from kept states. "
        "Keys and values are kept as long as no sequence needs their pages. 0: no prefix cache",
    ).field
    prefix_cache_in: str = Setting(
        "device",
        Choice(PrefixMemory),
        "whose memory these states are in. `host`: a GPU's own is left to sequences, and a prompt that begins alike "
        "gets its states copied back. On a CPU both are the same",
    ).field
    link_timeout_s: float = Setting(
        10.0, Number(_LINK_LOW_S), "a tower process without a message for this long counts as lost"
    ).field
    stall_timeout_s: float = Setting(60.0, Number(0, low_open=True), "how long one tick of a tower may take").field
    start_timeout_s: float = Setting(600.0, Number(0, low_open=True), "how long loading a tower may take").field
    mend_timeout_s: float = Setting(
        600.0, Number(0, low_open=True), "how long replacing a lost tower may take; then Serve replaces the cell"
    ).field
    max_queued_requests: int = Setting(64, Integer(0), "requests that may wait for a cell").field
    capture: str = Setting(
        "auto",
        Choice(Capture),
        "record usual passes and replay them. `on`: all of them, at start, which takes a while; on CUDA a model with "
        "experts must then be bfloat16, and the GPU of compute capability 9 or 10. `auto`: on the CPU, passes that "
        "come up often; on CUDA, none",
    ).field

    experts: str = Setting(
        "stored",
        Choice(ExpertWord),
        "format of the routed experts' weights. `stored`: as in the checkpoint; `int8` and `int4`: quantised while "
        "they are read, to half and to 28 % of bfloat16's bytes, which changes tokens",
    ).field
    expert_group: int = Setting(
        0,
        Integer(0, GROUPS[-1]),
        f"with `int4`: how many weights share a scale: {', '.join(map(str, GROUPS))}; 0: {USUAL_GROUP}",
    ).field

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            try:
                setting.kind.read(name, getattr(self, name))
            except InvalidRequest as error:
                raise ConfigError(str(error)) from None
        ExpertFormat.of(self.experts, self.expert_group)

    @property
    def expert_format(self) -> ExpertFormat | None:
        """What experts are quantised to while they are read; None for as they are stored."""
        return ExpertFormat.of(self.experts, self.expert_group)

    @property
    def longest_delta(self) -> int:
        """Positions that one cache delta brings at most: a prompt's chunk or a block."""
        return min(max(self.prefill_chunk_tokens, MAX_BLOCK), self.max_sequence_length)

    @property
    def pages(self) -> int:
        """KV pages of each tower's cache on a CPU."""
        return self.pages_of(PAGE_TOKENS)

    @property
    def prefix_stride(self) -> int:
        """`prefix_stride_of` a CPU's pages."""
        return self.prefix_stride_of(PAGE_TOKENS)

    def pages_of(self, page_tokens: int) -> int:
        """KV pages of each tower's cache, of so many positions each (`model/pages.py`)."""
        if page_tokens == PAGE_TOKENS or self.cache_tokens:
            return pages_for(self.cache_tokens or self.max_sequences * self.max_sequence_length, page_tokens)
        return self.max_sequences * pages_for(self.max_sequence_length, page_tokens)  # a large page is not shared

    def prefix_stride_of(self, page_tokens: int) -> int:
        """Positions between the places where a prefix may end; 0 where none is kept. A chunk and a page end there."""
        return math.lcm(self.prefill_chunk_tokens, page_tokens) if self.prefix_cache_bytes else 0

    def snapshots(self, state_bytes: int, page_tokens: int = PAGE_TOKENS) -> int:
        """Prefixes whose states are kept, at so many bytes each: no more than the pages hold, and none if no prompt is
        longer than a stride.

        Raises ConfigError where there are bytes for less than one.
        """
        if not self.prefix_cache_bytes:
            return 0
        if state_bytes > self.prefix_cache_bytes:
            raise ConfigError(
                f"prefix_cache_bytes: got {self.prefix_cache_bytes}, wanted 0 or at least {state_bytes}, the Mamba "
                "states of one prefix of this model"
            )
        stride = self.prefix_stride_of(page_tokens)
        most = self.pages_of(page_tokens) // (stride // page_tokens) if stride < self.max_sequence_length else 0
        return min(most, self.prefix_cache_bytes // state_bytes) if state_bytes else most


SETTINGS = settings_in(fields(EngineSettings))
