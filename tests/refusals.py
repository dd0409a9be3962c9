"""Calls that the real kernels refuse, by name: for the stand-ins and, in `tests/kernels`, for the real packages."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

BF16 = torch.bfloat16


class Refusal(NamedTuple):
    """Everything that is passed, and what is raised."""

    name: str
    given: dict[str, Any]
    error: type[Exception] | tuple[type[Exception], ...] = RuntimeError


def convolution_call(dtype: torch.dtype = BF16, channels: int = 16) -> dict[str, Any]:
    """What ours passes for 20 positions of 3 rows and 4 taps."""
    by_channel = torch.zeros(3, 24, channels, dtype=dtype).transpose(1, 2)
    given = {"x": by_channel[:, :, 4:], "weight": torch.zeros(channels, 4, dtype=dtype), "bias": None}
    return {**given, "initial_states": by_channel[:, :, 1:4], "activation": "silu"}


def convolution_refusals() -> Iterator[Refusal]:
    for name, changed in {
        "channels not innermost": {"x": torch.zeros(3, 16, 20, dtype=BF16)},
        "strides that are no multiple of 8": {"x": torch.zeros(3, 20, 17, dtype=BF16).transpose(1, 2)[:, :16]},
        "misaligned": {"x": torch.zeros(3 * 20 * 16 + 1, dtype=BF16)[1:].view(3, 20, 16).transpose(1, 2)},
        "five taps": {"weight": torch.zeros(16, 5, dtype=BF16)},
        "another number of channels": {"weight": torch.zeros(8, 4, dtype=BF16)},
        "bias of another dtype": {"bias": torch.zeros(16)},
        "one state too many": {"initial_states": torch.zeros(3, 4, 16, dtype=BF16).transpose(1, 2)},
        "states of another dtype": {"initial_states": torch.zeros(3, 3, 16).transpose(1, 2)},
        "states with channels not innermost": {"initial_states": torch.zeros(3, 16, 3, dtype=BF16)},
    }.items():
        yield Refusal(name, {**convolution_call(), **changed})
    yield Refusal("channels that are no multiple of 8", convolution_call(channels=12))
    yield Refusal("fp64", convolution_call(torch.float64))
    yield Refusal("another activation", {**convolution_call(), "activation": "relu"}, NotImplementedError)


def step_call() -> dict[str, Any]:
    """What ours passes for 3 rows of 4 heads in 2 groups: dt, A, D and dt_bias are one number a head."""
    head = torch.zeros(4)
    dt, bias, a = head.expand(3, 4)[..., None].expand(3, 4, 8), torch.zeros(()).expand(4, 8), head[:, None, None]
    state, groups = torch.zeros(3, 4, 8, 16), torch.zeros(3, 2, 16)
    given = {"state": state, "x": torch.zeros(3, 4, 8), "dt": dt, "A": a.expand(4, 8, 16), "B": groups, "C": groups}
    return {**given, "D": bias, "dt_bias": bias}


def step_refusals() -> Iterator[Refusal]:
    given = step_call()
    yield Refusal("no D", {**given, "D": None}, TypeError)
    yield Refusal("no dt_bias", {**given, "dt_bias": None}, (AttributeError, TypeError))
    for name, shape in {"x": (3, 4, 9), "dt": (3, 4, 9), "A": (4, 8, 17), "B": (3, 3, 16), "C": (3, 2, 17)}.items():
        yield Refusal(f"{name} of another shape", {**given, name: torch.zeros(shape)}, AssertionError)
    for name in ("D", "dt_bias"):
        yield Refusal(f"{name} of another shape", {**given, name: torch.zeros(4, 9)}, AssertionError)


def scan_call() -> dict[str, Any]:
    """What ours passes for 16 positions of 2 rows."""
    groups = torch.zeros(2, 16, 2, 16)
    given = {"x": torch.zeros(2, 16, 4, 8), "dt": torch.zeros(2, 16, 4), "A": torch.zeros(4), "B": groups, "C": groups}
    more = {"chunk_size": 16, "initial_states": torch.zeros(2, 4, 8, 16), "return_final_states": True}
    return {**given, **more}


def scan_refusals() -> Iterator[Refusal]:
    for name, shape in {
        "dt": (2, 16, 5),
        "A": (5,),
        "B": (2, 16, 3, 16),
        "C": (2, 16, 2, 17),
        "initial_states": (2, 4, 8, 17),
    }.items():
        yield Refusal(f"{name} of another shape", {**scan_call(), name: torch.zeros(shape)}, AssertionError)


def flash_call(dtype: torch.dtype = BF16, width: int = 16, kv_heads: int = 2) -> dict[str, Any]:
    """What ours passes for 5 positions of 3 rows over 40 keys."""
    keys = torch.zeros(3, 40, kv_heads, width, dtype=dtype)
    given = {"q": torch.zeros(3, 5, 4, width, dtype=dtype), "k_cache": keys, "v_cache": keys.clone()}
    return {**given, "cache_seqlens": torch.tensor([5, 17, 40], dtype=torch.int32), "causal": True}


def flash_refusals() -> Iterator[Refusal]:
    yield from _both_flash_refusals(flash_call, "q", "k_cache", "cache_seqlens")
    for name, keys in {
        "keys with heads across": torch.zeros(3, 40, 16, 2, dtype=BF16).transpose(2, 3),
        "values with heads across": torch.zeros(3, 40, 16, 2, dtype=BF16).transpose(2, 3),
    }.items():
        part = "k_cache" if name.startswith("keys") else "v_cache"
        yield Refusal(name, {**flash_call(), part: keys}, AssertionError)
    yield Refusal("fewer values", {**flash_call(), "v_cache": torch.zeros(3, 39, 2, 16, dtype=BF16)})
    yield Refusal("another number of rows", {**flash_call(), "k_cache": torch.zeros(2, 40, 2, 16, dtype=BF16)})


def paged_call(dtype: torch.dtype = BF16, width: int = 16, kv_heads: int = 2, page: int = 256) -> dict[str, Any]:
    """As `flash_call`, over 7 pages of which each row has 2."""
    pages = torch.zeros(7, page, kv_heads, width, dtype=dtype)
    given = {"q": torch.zeros(3, 5, 4, width, dtype=dtype), "k_cache": pages, "v_cache": pages.clone()}
    table = torch.tensor([[6, 0], [2, 1], [5, 4]], dtype=torch.int32)
    numbers = {"cache_seqlens": torch.tensor([5, 17, 300], dtype=torch.int32), "block_table": table}
    return {**given, **numbers, "causal": True, "return_softmax_lse": True}


def paged_refusals() -> Iterator[Refusal]:
    for refusal in _both_flash_refusals(paged_call, "q", "k_cache", "cache_seqlens"):
        yield refusal._replace(name=f"pages, {refusal.name}")
    given = paged_call()
    table = given["block_table"]
    for size in (16, 128, 257, 384):
        yield Refusal(f"pages of {size}", paged_call(page=size))
    for name, changed in {
        "a table in 64 bits": table.long(),
        "a table of fewer rows": table[:2],
        "a flat table": table.flatten(),
    }.items():
        yield Refusal(name, {**given, "block_table": changed}, (RuntimeError, IndexError))
    yield Refusal("fewer pages of values", {**given, "v_cache": given["v_cache"][:6]})


def varlen_call(dtype: torch.dtype = BF16, width: int = 16, kv_heads: int = 2) -> dict[str, Any]:
    """As `flash_call`, rows packed."""
    keys, row = torch.zeros(120, kv_heads, width, dtype=dtype), torch.arange(4, dtype=torch.int32)
    given = {"query": torch.zeros(15, 4, width, dtype=dtype), "key": keys, "value": keys.clone()}
    lengths = {"cu_seq_q": row * 5, "cu_seq_k": row * 40, "max_q": 5, "max_k": 40}
    more = {"window_size": (-1, 0), "enable_gqa": True, "seqused_k": torch.tensor([5, 17, 40], dtype=torch.int32)}
    return {**given, **lengths, **more}


def paged_varlen_call(dtype: torch.dtype = BF16, width: int = 16, kv_heads: int = 2, page: int = 256) -> dict[str, Any]:
    """As `paged_call`, rows packed."""
    given, row = paged_call(dtype, width, kv_heads, page), torch.arange(4, dtype=torch.int32)
    packed = {"query": given["q"].flatten(0, 1), "key": given["k_cache"], "value": given["v_cache"]}
    lengths = {"cu_seq_q": row * 5, "cu_seq_k": row * 2 * page, "max_q": 5, "max_k": 2 * page}
    seen = {"seqused_k": given["cache_seqlens"], "block_table": given["block_table"], "num_splits": 1}
    return {**packed, **lengths, **seen, "window_size": (-1, 0), "enable_gqa": True}


def paged_varlen_refusals() -> Iterator[Refusal]:
    for refusal in _both_flash_refusals(paged_varlen_call, "query", "key", "seqused_k"):
        yield refusal._replace(name=f"pages, {refusal.name}")
    for size in (16, 128, 384):
        yield Refusal(f"pages of {size}", paged_varlen_call(page=size))
    yield Refusal("a table in 64 bits", {**paged_varlen_call(), "block_table": paged_call()["block_table"].long()})


def varlen_refusals() -> Iterator[Refusal]:
    yield from _both_flash_refusals(varlen_call, "query", "key", "seqused_k")
    yield Refusal("heads that are no multiple of 8", varlen_call(width=12))
    yield Refusal("groups that nobody enabled", {**varlen_call(), "enable_gqa": False}, ValueError)
    offsets = torch.arange(4) * 5
    yield Refusal("offsets in 64 bits", {**varlen_call(), "cu_seq_q": offsets})


def _both_flash_refusals(call: Any, query: str, key: str, numbers: str) -> Iterator[Refusal]:
    """What flash-attn and torch's copy of it both refuse, each by its own names."""
    given: Mapping[str, Any] = call()
    yield Refusal("fp32", call(torch.float32))
    yield Refusal("heads wider than 256", call(width=264))
    yield Refusal("heads that no group divides", call(kv_heads=3), (RuntimeError, ValueError))
    yield Refusal("keys of another dtype", {**given, key: given[key].half()})
    shape, total = given[query].shape, given[query].numel()
    yield Refusal("misaligned", {**given, query: torch.zeros(total + 1, dtype=BF16)[1:].view(shape)})
    yield Refusal("numbers in 64 bits", {**given, numbers: given[numbers].long()})
    yield Refusal("fewer numbers", {**given, numbers: given[numbers][:2]})
    yield Refusal("numbers with gaps", {**given, numbers: given[numbers].repeat_interleave(2)[::2]})
