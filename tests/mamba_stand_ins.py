"""mamba-ssm and causal-conv1d as their sources have them (2.3.2 and 1.7.0), slowly, in our own words.

What ours never passes they do not take; what the real ones refuse they refuse. `tests/kernels` holds them to the real
packages, and runs the real causal-conv1d over `causal_conv1d_fwd`, which stands for its compiled part.
"""

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def refuse_unless(condition: bool, why: str) -> None:
    """As compiled code refuses."""
    if not condition:
        raise RuntimeError(why)


def aligned(part: Tensor, *dims: int) -> bool:
    """16 bytes at a time can be read along the innermost axis, from any place along `dims`."""
    return part.data_ptr() % 16 == 0 and all(part.stride(dim) * part.element_size() % 16 == 0 for dim in dims)


class MambaStandIns:
    """Keeps the chunk sizes it was given."""

    def __init__(self) -> None:
        self.chunks: list[tuple[int, int]] = []

    def load(self, name: str) -> ModuleType:
        functions = {
            "mamba_ssm.ops.triton.ssd_combined": self.mamba_chunk_scan_combined,
            "mamba_ssm.ops.triton.selective_state_update": self.selective_state_update,
            "causal_conv1d": self.causal_conv1d_fn,
        }
        if name not in functions:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return SimpleNamespace(**{functions[name].__name__: functions[name]})  # type: ignore[return-value]

    def mamba_chunk_scan_combined(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        *,
        initial_states: Tensor,
        return_final_states: bool = False,
    ) -> tuple[Tensor, Tensor]:
        rows, length, heads, width = x.shape
        assert dt.shape == (rows, length, heads) and A.shape == (heads,)
        assert B.shape[:2] == (rows, length) and C.shape == B.shape and heads % B.shape[2] == 0
        assert initial_states.shape == (rows, heads, width, B.shape[3])
        assert return_final_states, "what ours always asks for"
        assert x.dtype == dt.dtype == B.dtype == initial_states.dtype == torch.float32, "as ours computes scans"
        self.chunks.append((chunk_size, length))
        state, zero_HP = initial_states.clone(), A.new_zeros(heads, width)
        a_HPN = A[:, None, None].expand(state.shape[1:])
        outputs = []
        for t in range(length):
            dt_RHP = dt[:, t, :, None].expand(x[:, t].shape)
            now = (x[:, t], dt_RHP, a_HPN, B[:, t], C[:, t])
            outputs.append(self.selective_state_update(state, *now, D=zero_HP, dt_bias=zero_HP))
        return torch.stack(outputs, 1), state

    def selective_state_update(
        self,
        state: Tensor,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        *,
        dt_bias: Tensor | None = None,
    ) -> Tensor:
        """In place, as the real one. Optional or not, the launcher reads the strides of `D` and `dt_bias`."""
        rows, (heads, width, numbers) = x.shape[0], state.shape[1:]
        assert dt.shape == x.shape == (rows, heads, width)
        assert A.shape == (heads, width, numbers)
        assert B.shape == C.shape == (rows, B.shape[1], numbers)
        assert heads % B.shape[1] == 0
        if dt_bias is None:
            raise AttributeError("'NoneType' object has no attribute 'stride'")
        if D is None:
            raise TypeError("Value after * must be an iterable, not int")
        assert D.shape == dt_bias.shape == (heads, width)
        group = heads // B.shape[1]
        b, c = (part.repeat_interleave(group, 1)[:, :, None] for part in (B, C))
        dt = dt + dt_bias
        state.mul_(torch.exp(dt[..., None] * A)).add_((dt * x)[..., None] * b)
        return (state * c).sum(-1) + x * D

    def causal_conv1d_fn(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        initial_states: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        if activation not in (None, "silu", "swish"):
            raise NotImplementedError("activation must be None, silu, or swish")
        x = x if 1 in (x.stride(1), x.stride(2)) else x.contiguous()
        out = torch.empty_like(x)
        causal_conv1d_fwd(x, weight, bias, None, initial_states, out, None, activation is not None)
        return out


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    out: Tensor,
    final_states: Tensor | None,
    silu: bool,
) -> None:
    """The compiled part, into `out`, with all that it checks but where its tensors are."""
    assert seq_idx is None and final_states is None, "what ours never passes"
    rows, channels, _ = x.shape
    taps = weight.shape[-1]
    refuse_unless(x.dtype in (torch.float32, torch.float16, torch.bfloat16), "input_type")
    refuse_unless(weight.dtype in (torch.float32, torch.float16, torch.bfloat16), "weight_type")
    refuse_unless(weight.shape == (channels, taps), "weight must have shape (dim, width)")
    refuse_unless(1 in (x.stride(1), x.stride(2)), "x.stride(2) == 1 || x.stride(1) == 1")
    channel_last = x.stride(1) == 1 and x.stride(2) > 1
    if channel_last:
        refuse_unless(channels % 8 == 0, "causal_conv1d only supports channel dimension divisible by 8 for now")
        refuse_unless(x.stride(0) % 8 == x.stride(2) % 8 == 0, "strides must be multiples of 8")
        refuse_unless(out.stride(1) == 1 and aligned(x, 0, 2) and aligned(out, 0, 2), "misaligned address")
    refuse_unless(2 <= taps <= 4, "causal_conv1d only supports width between 2 and 4")
    if bias is not None:
        refuse_unless(bias.dtype is weight.dtype, "bias.scalar_type() == weight_type")
        refuse_unless(bias.shape == (channels,) and bias.stride(-1) == 1, "bias must have shape (dim)")
    joined = F.pad(x, [taps - 1, 0])
    if initial_states is not None:
        refuse_unless(channel_last, "initial_states is only supported for channel last layout")
        refuse_unless(initial_states.dtype is x.dtype, "initial_states.scalar_type() == input_type")
        refuse_unless(initial_states.shape == (rows, channels, taps - 1), "initial_states must have shape")
        refuse_unless(initial_states.stride(1) == 1, "initial_states.stride(1) == 1")
        refuse_unless(aligned(initial_states, 0, 2), "misaligned address")
        joined = torch.cat([initial_states, x], 2)
    summed = F.conv1d(joined.float(), weight.float()[:, None], None if bias is None else bias.float(), groups=channels)
    out.copy_(F.silu(summed) if silu else summed)


def signature_misfits(stand_in: Callable[..., Any], real: Callable[..., Any]) -> list[str]:
    """What a stand-in takes and the real function does not, or takes otherwise. It may take less, and want more."""
    ours, theirs = inspect.signature(stand_in).parameters, inspect.signature(real).parameters
    found = [name for name in ours if name not in theirs]
    for name in ours.keys() & theirs.keys():
        mine, real_one = ours[name], theirs[name]
        if mine.default is not mine.empty and mine.default != real_one.default:
            found.append(f"{name}: {mine.default}, not {real_one.default}")
        if mine.kind is mine.POSITIONAL_OR_KEYWORD and list(ours).index(name) != _place(theirs, name):
            found.append(f"{name}: by place")
    return sorted(found)


def _place(parameters: Mapping[str, inspect.Parameter], name: str) -> int | None:
    """Where it may be passed by place."""
    by_name = parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    return None if by_name else list(parameters).index(name)
