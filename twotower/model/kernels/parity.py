"""How far a replacement is from the plain torch function, on random inputs: the one measure for tests and loading.

Inputs are like a bf16 model's: values that bf16 holds, computed with in fp32. Attention replacements compute in the
model's own dtype and are held to the plain one in fp32.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from twotower.config import ModelConfig
from twotower.model import mamba
from twotower.model.attention import Attend, AttendInPages, attend
from twotower.model.in_pages import PLACES_OF_A_TABLE, InPages, Own
from twotower.model.mamba import Convolve, Scan, ScanInputs, Step
from twotower.model.quantised import GroupedProduct, Packed, plain_product, quantise

# Of the largest value. Three bf16 roundings make 3 · 2⁻⁹ ≈ 6e-3 (torch's convolution rounds twice, a fused one once).
# TF32 products make less. A wrong kernel is off by its whole output.
TOLERANCE = 1e-2
# Of attention in pages: two results and their shares are rounded, and then what is mixed of them. With nothing else
# rounded that makes 6e-3.
PAGED_TOLERANCE = 1.5e-2
LENGTHS = (1, 2, 16, 24, 130)  # a step, less than a chunk, a block, a chunk and a half, more than one chunk
_ROWS = 3
_ROWS_OF_EXPERTS = (5, 0, 1, 33, 16)
_CACHED = (37, 1040)  # by the row that has read most: within one tile of a kernel, and enough to be shared out


def convolution_deviations(
    convolve: Convolve, config: ModelConfig, device: torch.device, lengths: Iterable[int] = LENGTHS
) -> Iterator[tuple[str, float]]:
    """Every case's name and deviation."""
    for length in lengths:
        stream_RTC, conv1d = _stream(config, length, device)
        plain = mamba.convolve(stream_RTC, conv1d)
        yield f"convolution [{_ROWS},{length}]", _off(convolve(stream_RTC, conv1d), plain)


def scan_deviations(
    scan: Scan, config: ModelConfig, device: torch.device, lengths: Iterable[int] = LENGTHS
) -> Iterator[tuple[str, float]]:
    """Of the lengths, those of more than one position."""
    for length in lengths:
        if length > 1:
            inputs, ssm_RHPN = scan_inputs(config, length, device)
            before = ssm_RHPN.clone()
            y, (*_, end) = scan(inputs, ssm_RHPN, config.chunk_size, True)
            plain_y, (*_, plain_end) = mamba.scan(inputs, before, config.chunk_size, True)
            yield f"scan [{_ROWS},{length}]", _off(y, plain_y)
            yield f"state after [{_ROWS},{length}]", _off(end, plain_end)
            yield f"state before [{_ROWS},{length}] left alone", _off(ssm_RHPN, before)


def step_deviations(step: Step, config: ModelConfig, device: torch.device) -> Iterator[tuple[str, float]]:
    inputs, ssm_RHPN = scan_inputs(config, 1, device)
    before = ssm_RHPN.clone()
    (y, end), (plain_y, plain_end) = step(inputs, ssm_RHPN), mamba.step(inputs, before)
    yield f"step [{_ROWS},1]", _off(y, plain_y)
    yield f"state after [{_ROWS},1]", _off(end, plain_end)
    yield f"state before [{_ROWS},1] left alone", _off(ssm_RHPN, before)


@dataclass
class _Reach:
    mask_RLT: Tensor
    starts_R: Tensor | None
    lengths_R: Tensor | None
    updates: bool


def attention_deviations(
    replacement: Attend, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, float]]:
    """Rows that have read different amounts and read on by different lengths, causally and as a block.

    Row by row, because an average over many keys is small. Of padding it is only asked that it be finite.
    """
    for cached, length in product(_CACHED, LENGTHS):
        q, k, v = _queries_keys_values(config, length, cached + length, device, dtype)
        starts, short = (0, 5, cached), (length + 1) // 2
        for lengths in dict.fromkeys([(length, length, length), (length, short, short)]):
            for name, reach in _reaches(starts, lengths, length, device):
                plain = attend(q.float(), k.float(), v.float(), reach)
                ours = replacement(q, k.clone(), v.clone(), reach)
                case = f"attention, {name} [{_ROWS},{length}]"
                yield f"{case}, finite", _off(ours.isfinite(), plain.isfinite())
                for row, (start, real) in enumerate(zip(starts, lengths, strict=True)):
                    yield f"{case}, {real} after {start} of {cached}", _off(ours[row, :real], plain[row, :real])


def _reaches(
    starts: tuple[int, ...], lengths: tuple[int, ...], width: int, device: torch.device
) -> Iterator[tuple[str, _Reach]]:
    """Over max(starts) cached keys and `width` more: keys in order, seen causally; a row's own ones last, all seen."""
    starts_R1, lengths_R1 = (torch.tensor(numbers, device=device)[:, None] for numbers in (starts, lengths))
    new_L, keys_T = torch.arange(width, device=device), torch.arange(max(starts) + width, device=device)
    given = (starts_R1[:, 0], None if min(lengths) == width else lengths_R1[:, 0])
    last_RL = starts_R1 + torch.minimum(new_L, lengths_R1 - 1)
    yield "causal", _Reach(keys_T <= last_RL[..., None], *given, updates=True)
    seen_RT = torch.cat([keys_T[: max(starts)] < starts_R1, new_L < lengths_R1], dim=1)
    yield "block", _Reach(seen_RT[:, None].expand(-1, width, -1), *given, updates=False)


def _queries_keys_values(
    config: ModelConfig, length: int, room: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Tensor]:
    random = _generator(device)
    for count, heads in (
        (length, config.num_attention_heads),
        (room, config.num_key_value_heads),
        (room, config.num_key_value_heads),
    ):
        yield torch.randn(_ROWS, count, heads, config.head_dim, generator=random, device=device).to(dtype)


def paged_deviations(
    replacement: AttendInPages, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, float]]:
    """As `attention_deviations`, with the keys in pages that lie in another order. What no row sees is large there, so
    that a key too many shows; and the pages must stay as they are."""
    for cached, length in product(_CACHED, LENGTHS):
        q, k, v = _queries_keys_values(config, length, cached + length, device, dtype)
        starts, short = (0, 5, cached), (length + 1) // 2
        for lengths in dict.fromkeys([(length, length, length), (length, short, short)]):
            for name, reach in _reaches(starts, lengths, length, device):
                plain = attend(q.float(), k.float(), v.float(), reach)
                seen, before = _in_pages(k, v, starts, lengths, reach)
                ours = replacement(q, seen)
                case = f"attention in pages, {name} [{_ROWS},{length}]"
                yield f"{case}, finite", _off(ours.isfinite(), plain.isfinite())
                changed = not torch.equal(torch.stack([seen.keys, seen.values]), before)
                yield f"{case}, pages left alone", torch.inf if changed else 0.0
                for row, (start, real) in enumerate(zip(starts, lengths, strict=True)):
                    yield f"{case}, {real} after {start} of {cached}", _off(ours[row, :real], plain[row, :real])


def _in_pages(
    keys_RTSE: Tensor, values_RTSE: Tensor, starts: tuple[int, ...], lengths: tuple[int, ...], reach: _Reach
) -> tuple[InPages, Tensor]:
    """What `_reaches` reaches, in pages from the last to the first; and a copy of these pages."""
    rows, room, size = keys_RTSE.shape[0], keys_RTSE.shape[1], PLACES_OF_A_TABLE
    device, length = keys_RTSE.device, reach.mask_RLT.shape[1]
    columns = -(-room // size)
    table_RZ = torch.arange(rows * columns, device=device).flip(0).view(rows, columns)
    pages = torch.full((2, rows * columns, size, *keys_RTSE.shape[2:]), 100.0, device=device).to(keys_RTSE.dtype)
    own = None
    for row, start in enumerate(starts):
        end = start + length if reach.updates else start
        for part, of in zip(pages, (keys_RTSE, values_RTSE), strict=True):
            places = table_RZ[row].repeat_interleave(size) * size + torch.arange(columns * size, device=device) % size
            part.flatten(0, 1)[places[:end]] = of[row, :end]
    ends_R = torch.tensor([start + (length if reach.updates else 0) for start in starts], device=device)
    if not reach.updates:
        lengths_R = torch.tensor(lengths, device=device, dtype=torch.int32)
        own = Own(keys_RTSE[:, -length:], values_RTSE[:, -length:], lengths_R)
    return InPages(pages[0], pages[1], table_RZ.int(), ends_R.int(), own), pages.clone()


def product_deviations(
    replacement: GroupedProduct, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, float]]:
    """Both products of a few experts: of no row, one, a tile of the kernel and two. The plain one in fp32."""
    form = config.experts
    assert form is not None
    random = _generator(device)
    ends_E = torch.tensor(_ROWS_OF_EXPERTS, device=device).cumsum(0).int()
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    for part, outputs, inputs in (("up", inner, hidden), ("down", hidden, inner)):
        made = [quantise(torch.randn(outputs, inputs, generator=random, device=device), form) for _ in _ROWS_OF_EXPERTS]
        packed = Packed(*(torch.stack(parts) for parts in zip(*made, strict=True)))
        x_TK = torch.randn(sum(_ROWS_OF_EXPERTS), inputs, generator=random, device=device).to(dtype)
        plain = plain_product(x_TK.float(), packed, ends_E)
        yield f"{part} [{len(x_TK)},{inputs}] in {form}", _off(replacement(x_TK, packed, ends_E), plain)


def scan_inputs(config: ModelConfig, length: int, device: torch.device) -> tuple[ScanInputs, Tensor]:
    """Inputs of a scan over `length` positions as a mixer cuts them out of its convolution's output.

    The first row has a state of zeros, as one that has read nothing, and padding as its last position.
    """
    random = _generator(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device).bfloat16().float()

    heads, by_group = config.mamba_num_heads, (config.n_groups, config.ssm_state_size)
    dt = torch.rand(_ROWS, length, heads, generator=random, device=device) * 0.2
    if length > 1:
        dt[0, -1] = 0
    a = -1 - 15 * torch.rand(heads, generator=random, device=device)
    group_width = config.n_groups * config.ssm_state_size
    x, b, c = normal(_ROWS, length, config.conv_channels).split([config.mamba_width, group_width, group_width], dim=-1)
    ssm_RHPN = normal(_ROWS, heads, config.mamba_head_dim, config.ssm_state_size)
    ssm_RHPN[0] = 0
    by_head = (heads, config.mamba_head_dim)
    return ScanInputs(x.unflatten(-1, by_head), dt, a, b.unflatten(-1, by_group), c.unflatten(-1, by_group)), ssm_RHPN


def _stream(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, nn.Conv1d]:
    channels, taps = config.conv_channels, config.conv_kernel
    random = _generator(device)
    conv1d = nn.Conv1d(channels, channels, taps, groups=channels, bias=config.use_conv_bias)
    conv1d = conv1d.to(device, torch.bfloat16).requires_grad_(False)
    for parameter in conv1d.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=random, device=device))
    stream = torch.randn(_ROWS, taps + length, channels, generator=random, device=device)
    return stream.bfloat16(), conv1d


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(1)


def _off(ours: Tensor, plain: Tensor) -> float:
    """The largest difference, as a part of the largest value; infinite where a NaN is."""
    if ours.shape != plain.shape:
        return torch.inf
    difference = (ours.float() - plain.float()).abs().max() / plain.float().abs().max().clamp(min=1e-6)
    return float(difference.nan_to_num(torch.inf))
