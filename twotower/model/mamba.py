"""The Mamba-2 mixer: causal depthwise convolution, selective scan, gated group norm.

The scan always runs in fp32, from and to an fp32 state, whatever the model's dtype: a bf16 scan overflows on long
contexts (the released code's own remark). Several positions go through the chunked (matrix) form of the scan, one
position through the bare recurrence; both compute `h_t = exp(dt_t·A)·h_{t-1} + dt_t·x_t ⊗ B_t`, `y_t = h_t·C_t`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import ModelConfig
from twotower.model.states import LayerStates


class GatedGroupNorm(nn.Module):
    """`w ⊙ rms(y ⊙ silu(z))` with the statistics taken over each of G contiguous groups of channels; fp32."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups, self.eps = groups, eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        gated = y.float() * F.silu(gate.float())
        grouped = gated.unflatten(-1, (self.groups, -1))
        normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * normed.flatten(-2)).to(self.weight.dtype)


class ScanInputs(NamedTuple):
    """What the scan reads, all fp32: x [R,L,H,P], dt [R,L,H] (0 at padding), a [H] (negative), b and c [R,L,G,N]."""

    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor


class MambaMixer(nn.Module):
    """One `M` layer. `dt_bias`, `A_log` and `D` stay fp32 in a bf16 model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.heads, self.head_dim, self.groups = config.mamba_num_heads, config.mamba_head_dim, config.n_groups
        width, channels = config.mamba_width, config.conv_channels
        self.in_proj = nn.Linear(config.hidden_size, width + channels + self.heads, bias=config.use_bias)
        self.conv1d = nn.Conv1d(
            channels, channels, config.conv_kernel, groups=channels, bias=config.use_conv_bias
        )
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedGroupNorm(width, self.groups, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=config.use_bias)

    def forward(self, x_RLD: Tensor, layer: int, states: LayerStates) -> Tensor:
        width, channels = self.config.mamba_width, self.config.conv_channels
        gate, xbc_RLC, dt_RLH = self.in_proj(x_RLD).split([width, channels, self.heads], dim=-1)
        window_RKC, ssm_RHPN = states.mamba(layer)
        stream_RTC = torch.cat([window_RKC, xbc_RLC], dim=1)
        inputs = self._scan_inputs(self._convolve(stream_RTC), dt_RLH, states.lengths_R)
        if x_RLD.shape[1] == 1:
            y_RLHP, ssm_RHPN = step(inputs, ssm_RHPN)
        else:
            y_RLHP, ssm_RHPN, _ = scan(inputs, ssm_RHPN, self.config.chunk_size)
        if states.updates:
            states.put_mamba(layer, _newest(stream_RTC, self.config.conv_kernel, states.lengths_R), ssm_RHPN)
        y_RLHP = y_RLHP + self.D.float()[:, None] * inputs.x
        out: Tensor = self.out_proj(self.norm(y_RLHP.flatten(2).to(x_RLD.dtype), gate))
        return out

    def _convolve(self, stream_RTC: Tensor) -> Tensor:
        """Causal depthwise convolution and silu over the K-1 newest cached vectors and the new ones, newest tap last.

        As K shifted products, which beats a depthwise conv1d on few positions, in fp32.
        """
        taps = self.config.conv_kernel
        stream = stream_RTC[:, 1:].float()
        positions = stream.shape[1] - taps + 1
        weight_KC = self.conv1d.weight[:, 0].float().T
        out = stream[:, :positions] * weight_KC[0]
        for tap in range(1, taps):
            out = torch.addcmul(out, stream[:, tap : tap + positions], weight_KC[tap])
        if self.conv1d.bias is not None:
            out = out + self.conv1d.bias.float()
        return F.silu(out.to(stream_RTC.dtype)).float()

    def _scan_inputs(self, xbc_RLC: Tensor, dt_RLH: Tensor, lengths_R: Tensor | None) -> ScanInputs:
        state = self.groups * self.config.ssm_state_size
        x, b, c = xbc_RLC.split([self.config.mamba_width, state, state], dim=-1)
        dt = F.softplus(dt_RLH.float() + self.dt_bias.float()).clamp(*self.config.time_step_limit)
        if lengths_R is not None:
            # dt = 0 makes a padded position leave the state as it is.
            real_RL = torch.arange(dt.shape[1], device=dt.device) < lengths_R[:, None]
            dt = dt * real_RL[..., None]
        by_head, by_group = (self.heads, self.head_dim), (self.groups, self.config.ssm_state_size)
        a = -torch.exp(self.A_log.float())
        return ScanInputs(x.unflatten(-1, by_head), dt, a, b.unflatten(-1, by_group), c.unflatten(-1, by_group))


def _newest(stream_RTC: Tensor, window: int, lengths_R: Tensor | None) -> Tensor:
    """The last K real vectors of [old window | new vectors | padding]."""
    if lengths_R is None:
        return stream_RTC[:, -window:]
    index_RK = lengths_R[:, None] + torch.arange(window, device=stream_RTC.device)
    return stream_RTC.gather(1, index_RK[..., None].expand(-1, -1, stream_RTC.shape[2]))


def step(inputs: ScanInputs, ssm_RHPN: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence for one position. Returns y [R,1,H,P] and the state after it."""
    x_RHP, dt_RH = inputs.x[:, 0], inputs.dt[:, 0]
    per_group = x_RHP.shape[1] // inputs.b.shape[2]
    b_RHN = inputs.b[:, 0].repeat_interleave(per_group, dim=1)
    c_RHN = inputs.c[:, 0].repeat_interleave(per_group, dim=1)
    decay_RH = torch.exp(dt_RH * inputs.a)
    ssm_RHPN = ssm_RHPN * decay_RH[..., None, None] + (dt_RH[..., None] * x_RHP)[..., None] * b_RHN[:, :, None]
    y_RHP = (ssm_RHPN @ c_RHN[..., None])[..., 0]
    return y_RHP[:, None], ssm_RHPN


def scan(inputs: ScanInputs, ssm_RHPN: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over L positions, in chunks (Mamba-2 paper, §6: the block decomposition of the SSD matrix).

    Returns y [R,L,H,P], the state after the last position, and the states each chunk started from [R,chunks,H,P,N].
    The chunk never exceeds L: a longer one together with an initial state is a known trap of the fused kernels.
    """
    length = inputs.x.shape[1]
    chunk = min(chunk, length)
    x, dt, b, c = (_in_chunks(t, chunk) for t in (inputs.x, inputs.dt, inputs.b, inputs.c))
    per_group = x.shape[3] // b.shape[3]
    # Axes from here on: R, Z chunks, H heads (or G groups), then Q query and K key position inside the chunk.
    total_RZHQ = (dt * inputs.a).cumsum(2).transpose(2, 3)
    inside = total_RZHQ[..., :, None] - total_RZHQ[..., None, :]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    decay_RZHQK = torch.exp(inside.masked_fill(~causal, -torch.inf))
    scores_RZGQK = torch.einsum("rzqgn,rzkgn->rzgqk", c, b)
    weights = scores_RZGQK.repeat_interleave(per_group, dim=2) * decay_RZHQK
    dtx = (dt[..., None] * x).transpose(2, 3)  # R,Z,H,K,P
    y = weights @ dtx
    b_heads = b.transpose(2, 3).repeat_interleave(per_group, dim=2)  # R,Z,H,K,N
    c_heads = c.transpose(2, 3).repeat_interleave(per_group, dim=2)
    to_end = torch.exp(total_RZHQ[..., -1:] - total_RZHQ)
    gained = (dtx * to_end[..., None]).transpose(3, 4) @ b_heads  # R,Z,H,P,N
    kept = torch.exp(total_RZHQ[..., -1])
    entries = []
    for z in range(x.shape[1]):
        entries.append(ssm_RHPN)
        ssm_RHPN = ssm_RHPN * kept[:, z, :, None, None] + gained[:, z]
    entries_RZHPN = torch.stack(entries, dim=1)
    carried = torch.exp(total_RZHQ)[..., None] * (c_heads @ entries_RZHPN.transpose(3, 4))
    y_RLHP = (y + carried).transpose(2, 3).flatten(1, 2)[:, :length]
    return y_RLHP, ssm_RHPN, entries_RZHPN


def _in_chunks(t: Tensor, chunk: int) -> Tensor:
    """[R,L,...] → [R,chunks,chunk,...], padded with zeros on the right (dt = 0 there: no effect on the state)."""
    missing = -t.shape[1] % chunk
    if missing:
        t = torch.cat([t, t.new_zeros(t.shape[0], missing, *t.shape[2:])], dim=1)
    return t.unflatten(1, (-1, chunk))
