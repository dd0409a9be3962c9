"""The temporary memory of a forward pass: an upper bound, from shapes alone.

Layers run one after the other and keep nothing but the residual stream, so the bound is that of the largest layer. Two
things that a batch may need in addition are not counted. Rows that are padded to a far longer one read its padding too.
And two or more wide blocks beside others share passes only up to `MAX_POSITIONS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twotower.config import ModelConfig
from twotower.core import MAX_BLOCK
from twotower.decoding.guesses import positions_at_once
from twotower.engine.graphs import MOST_SEEN, power_of_two
from twotower.engine.passes import MAX_POSITIONS, USUAL_WIDTH
from twotower.engine.scores import MAX_LOGITS
from twotower.engine.settings import EngineSettings
from twotower.model.pages import CUDA_PAGE_TOKENS, PAGE_TOKENS, page_tokens_on, pages_for
from twotower.model.rescan import MOST_NUMBERS
from twotower.model.tower import ContextTower, DenoiserTower

_FP32 = 4
_COPIES = 4  # of a large intermediate at once: before and after an operation, in fp32 and in the model's dtype


@dataclass(frozen=True, slots=True)
class _Batch:
    """A kind of batch at its largest. `seen`: cached positions of all rows; `logits`: positions with logits; `keeps`:
    the scans of all layers, until it is known how much of a draft stands."""

    rows: int
    width: int
    seen: int
    logits: int
    keeps: bool = False

    @property
    def positions(self) -> int:
        return self.rows * self.width


def passing_bytes(
    config: ModelConfig,
    settings: EngineSettings,
    dtype: torch.dtype,
    towers: Sequence[type[ContextTower] | type[DenoiserTower]],
    on_gpu: bool = False,
) -> int:
    """The bound for these towers in one process, where they take turns."""
    page_tokens = page_tokens_on("cuda" if on_gpu else "cpu")
    batches = [batch for tower in towers for batch in _batches(config, settings, tower, page_tokens)]
    return max(_bytes(config, dtype, batch, on_gpu) for batch in batches)


def captured_bytes(
    config: ModelConfig,
    settings: EngineSettings,
    dtype: torch.dtype,
    towers: Sequence[type[ContextTower] | type[DenoiserTower]],
) -> int:
    """The memory that these towers' captured passes keep on a GPU. Each tower keeps the memory of its largest pass, in
    a pool of its own. The context tower also keeps the scans of one pass over drafts. A program recorded on a CPU keeps
    nothing.
    """
    rows = power_of_two(settings.max_sequences)
    page = CUDA_PAGE_TOKENS
    longest = pages_for(min(settings.max_sequence_length, settings.pages_of(page) * page) + USUAL_WIDTH, page)
    seen = min(rows * power_of_two(longest) * page, MOST_SEEN)
    batches = [_Batch(rows, USUAL_WIDTH, seen, rows) for _ in towers]  # of a block only hidden states are captured
    scans = len(config.layers_of("M")) * _scan(config, batches[0]) * _FP32 if ContextTower in towers else 0
    return sum(_bytes(config, dtype, batch, on_gpu=True) for batch in batches) + scans


def _batches(
    config: ModelConfig,
    settings: EngineSettings,
    tower: type[ContextTower] | type[DenoiserTower],
    page_tokens: int = PAGE_TOKENS,
) -> list[_Batch]:
    rows, longest = settings.max_sequences, settings.max_sequence_length
    seen = settings.pages_of(page_tokens) * page_tokens
    if tower is DenoiserTower:
        wide = min(MAX_BLOCK, longest)
        few, at_once = min(rows, max(1, MAX_POSITIONS // wide)), positions_at_once(config.vocab_size)
        return [
            _Batch(rows, USUAL_WIDTH, seen, min(rows * USUAL_WIDTH, at_once)),
            _Batch(few, wide, min(few * longest, seen), min(few * wide, at_once)),
        ]
    chunk = min(settings.prefill_chunk_tokens, longest)
    scored = min(chunk, max(1, MAX_LOGITS // config.vocab_size))
    drafted, wide = rows * USUAL_WIDTH, min(MAX_BLOCK, longest)
    most = max(1, MAX_LOGITS // config.vocab_size)
    return [
        _Batch(rows, USUAL_WIDTH, seen, rows),
        _Batch(1, chunk, min(longest, seen), scored),
        _Batch(rows, USUAL_WIDTH, seen, min(drafted, most), keeps=True),
        _Batch(1, wide, min(longest, seen), min(wide, most), keeps=True),
    ]


def _bytes(config: ModelConfig, dtype: torch.dtype, batch: _Batch, on_gpu: bool) -> int:
    layers = {
        "M": _mamba(config, batch),
        "*": _attention(config, dtype, batch, on_gpu),
        "E": _experts(config, batch),
        "-": _COPIES * batch.positions * config.intermediate_size * _FP32,
    }
    largest = max(layers[kind] for kind in set(config.hybrid_override_pattern))
    logits = _COPIES * batch.logits * config.vocab_size * _FP32
    kept = _kept(config, batch) if batch.keeps else 0
    return _COPIES * batch.positions * config.hidden_size * _FP32 + max(largest, logits) + kept


def _mamba(config: ModelConfig, batch: _Batch) -> int:
    """Gathered states and new ones; the projections; decays and scores of each pair of a chunk's positions."""
    state = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size
    chunk = min(config.chunk_size, batch.width)
    ends = 1 + -(-batch.width // chunk)
    pairs = batch.rows * chunk * chunk * config.mamba_num_heads
    projected = batch.positions * (config.mamba_width + config.conv_channels + config.mamba_num_heads)
    return _FP32 * (batch.rows * state * (ends + 2) + _COPIES * (projected + pairs))


def _kept(config: ModelConfig, batch: _Batch) -> int:
    """What every layer's scan read, then all of it side by side, and decays and gains up to the cut once more. A
    layer's b is a part of what its conv gave, which stays as long. Then states are moved on, some layers at a time."""
    layers, gains = len(config.layers_of("M")), batch.positions * (config.mamba_width + config.mamba_num_heads)
    state = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size
    states = min(max(MOST_NUMBERS, batch.rows * state), layers * batch.rows * state)
    return _FP32 * (layers * (2 * _scan(config, batch) + gains) + states)


def _scan(config: ModelConfig, batch: _Batch) -> int:
    """Numbers of what one layer's scan read."""
    window = batch.rows * config.conv_kernel * config.conv_channels
    vectors = batch.positions * config.conv_channels
    gains = batch.positions * (config.mamba_width + config.mamba_num_heads)
    return window + 2 * vectors + gains


def _attention(config: ModelConfig, dtype: torch.dtype, batch: _Batch, on_gpu: bool) -> int:
    """Keys and values of all positions, gathered beside a block's own; the mask; queries and outputs. A kernel that
    reads pages in place needs neither gathered keys nor a mask. But its use is known only once the kernel has been
    tried on the device. torch's fused attention keeps no scores. If heads are folded, the mask exists once more for
    each query head of a group. It exists twice again in the queries' dtype: once as torch converts the mask, and once
    as torch pads it.
    """
    keys = batch.seen + batch.positions
    gathered = 2 * keys * config.num_key_value_heads * config.head_dim * dtype.itemsize
    mask = keys * batch.width * _FP32
    group = config.num_attention_heads // config.num_key_value_heads
    if on_gpu and group > 1:
        mask += keys * batch.width * group * (1 + 2 * dtype.itemsize)
    return gathered + mask + _COPIES * batch.positions * config.num_attention_heads * config.head_dim * _FP32


def _experts(config: ModelConfig, batch: _Batch) -> int:
    """What goes into the experts and what comes out, once for each expert of a token; the shared expert's own. Of
    quantised ones, one matrix unpacked, in fp32 and in the model's dtype."""
    per_token = config.num_experts_per_tok * (config.hidden_size + config.moe_intermediate_size)
    shared = config.moe_shared_expert_intermediate_size
    unpacked = 3 * config.hidden_size * config.moe_intermediate_size if config.experts is not None else 0
    return _COPIES * batch.positions * (per_token + shared) * _FP32 + unpacked * _FP32
