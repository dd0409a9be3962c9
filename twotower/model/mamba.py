"""The Mamba-2 mixer: causal depthwise convolution, selective scan, gated group norm.

The scan always runs in fp32, from and to an fp32 state, whatever the model's dtype. According to the released code, a
bf16 scan overflows on long contexts. Several positions go through the chunked (matrix) form of the scan, one position
through the bare recurrence. Both compute `h_t = exp(dt_t·A)·h_{t-1} + dt_t·x_t ⊗ B_t`, `y_t = h_t·C_t`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.config import ModelConfig
from twotower.model.rescan import KeptScan
from twotower.model.states import LayerStates


class GatedGroupNorm(nn.Module):
    """`w ⊙ rms(y ⊙ silu(z))` with the statistics taken over each of G contiguous groups of channels; fp32."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups, self.eps = groups, eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        gated = (y.float() * F.silu(gate.float())).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], None, self.eps).flatten(-2)
        return (self.weight.float() * normed).to(self.weight.dtype)


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
        self.conv1d = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels, bias=config.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedGroupNorm(width, self.groups, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=config.use_bias)
        self.kernels = PLAIN

    def forward(self, x_RLD: Tensor, layer: int, states: LayerStates) -> Tensor:
        width, channels = self.config.mamba_width, self.config.conv_channels
        gate, xbc_RLC, dt_RLH = self.in_proj(x_RLD).split([width, channels, self.heads], dim=-1)
        window_RKC, ssm_RHPN = states.mamba(layer)
        stream_RTC = torch.cat([window_RKC, xbc_RLC], dim=1)
        inputs = self._scan_inputs(self.kernels.convolve(stream_RTC, self.conv1d), dt_RLH, states.lengths_R)
        if x_RLD.shape[1] == 1:
            y_RLHP, ssm_RHPN = self.kernels.step(inputs, ssm_RHPN)
        else:
            with_end = states.updates and states.kept is None
            y_RLHP, entries = self.kernels.scan(inputs, ssm_RHPN, self.config.chunk_size, with_end)
            ssm_RHPN = entries[-1]
        if states.kept is not None:
            states.kept.append(_kept(stream_RTC, inputs))
        elif states.updates:
            states.put_mamba(layer, _newest(stream_RTC, self.config.conv_kernel, states.lengths_R), ssm_RHPN)
        y_RLHP = torch.addcmul(y_RLHP, inputs.x, self.D.float()[:, None])
        return self.out_proj(self.norm(y_RLHP.flatten(2).to(x_RLD.dtype), gate))

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


def _kept(stream_RTC: Tensor, inputs: ScanInputs) -> KeptScan:
    return KeptScan(stream_RTC, torch.exp(inputs.dt * inputs.a), inputs.dt[..., None] * inputs.x, inputs.b)


def convolve(stream_RTC: Tensor, conv1d: nn.Conv1d) -> Tensor:
    """Causal depthwise convolution and silu over the K-1 newest cached vectors and the new ones, newest tap last; fp32.

    Computed as K shifted products in fp32, which is faster than a depthwise conv1d on few positions.
    """
    taps = conv1d.kernel_size[0]
    stream = stream_RTC[:, 1:].float()
    positions = stream.shape[1] - taps + 1
    weight_KC = conv1d.weight[:, 0].float().T.contiguous()
    bias_C = 0.0 if conv1d.bias is None else conv1d.bias.float()
    if positions == 1:
        out = (stream * weight_KC).sum(1, keepdim=True) + bias_C
    else:
        out = stream[:, :positions] * weight_KC[0] + bias_C
        for tap in range(1, taps):
            out.addcmul_(stream[:, tap : tap + positions], weight_KC[tap])
    return F.silu(out.to(stream_RTC.dtype)).float()


def _newest(stream_RTC: Tensor, window: int, lengths_R: Tensor | None) -> Tensor:
    """The last K real vectors of [old window | new vectors | padding]."""
    if lengths_R is None:
        return stream_RTC[:, -window:]
    index_RK = lengths_R[:, None] + torch.arange(window, device=stream_RTC.device)
    return stream_RTC.gather(1, index_RK[..., None].expand(-1, -1, stream_RTC.shape[2]))


def step(inputs: ScanInputs, ssm_RHPN: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence for one position. Returns y [R,1,H,P] and the state after it."""
    x_RHP, dt_RH = inputs.x[:, 0], inputs.dt[:, 0]
    groups = inputs.b.shape[2]
    decay_RH = torch.exp(dt_RH * inputs.a)
    gained = _by_group(dt_RH[..., None] * x_RHP, groups) @ inputs.b[:, 0, :, None]  # R,G,(H/G P),N
    ssm_RHPN = torch.addcmul(gained.view(ssm_RHPN.shape), ssm_RHPN, decay_RH[..., None, None])
    y = ssm_RHPN.view(gained.shape) @ inputs.c[:, 0, :, :, None]
    return y.view(x_RHP.shape)[:, None], ssm_RHPN


def _by_group(x_RHP: Tensor, groups: int) -> Tensor:
    """[R,H,P] → [R,G,(H/G P),1]: heads of one group lie side by side."""
    return x_RHP.reshape(x_RHP.shape[0], groups, -1, 1)


def scan(inputs: ScanInputs, ssm_RHPN: Tensor, chunk: int, with_end: bool = True) -> tuple[Tensor, list[Tensor]]:
    """The recurrence over L positions, in chunks (Mamba-2 paper, §6: the block decomposition of the SSD matrix).

    Returns y [R,L,H,P] and the states [R,H,P,N] each chunk started from, then the state after the last position.
    Without `with_end` (a pass that only reads) that last state is not computed.
    The chunk never exceeds L: a longer one together with an initial state is a known trap of the fused kernels.
    """
    length, heads, groups = inputs.x.shape[1], inputs.x.shape[2], inputs.b.shape[2]
    chunk = min(chunk, length)
    states, outputs = [ssm_RHPN], []
    for start in range(0, length, chunk):
        part = ScanInputs(*(t if t.dim() == 1 else t[:, start : start + chunk] for t in inputs))
        end_needed = with_end or start + chunk < length
        y, ssm_RHPN = _scan_chunk(part, states[-1], heads, groups, end_needed)
        outputs.append(y)
        states.append(ssm_RHPN)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), states


def _scan_chunk(part: ScanInputs, ssm_RHPN: Tensor, heads: int, groups: int, with_end: bool) -> tuple[Tensor, Tensor]:
    """One chunk: attention-like inside, the entry state carried in, the end state carried out.

    Axes: R rows, G groups, J heads of a group, Q and K positions (as query and as key), P head width, N state.
    """
    rows, length = part.dt.shape[:2]
    split = (groups, heads // groups)
    total_RGJQ = (part.dt * part.a).cumsum(1).transpose(1, 2).unflatten(1, split)
    future_QK = _future(length, part.dt.device)
    decay_RGJQK = torch.exp((total_RGJQ[..., :, None] - total_RGJQ[..., None, :]).masked_fill_(future_QK, -torch.inf))
    b_RGKN, c_RGQN = part.b.transpose(1, 2), part.c.transpose(1, 2)
    scores_RG1QK = (c_RGQN @ b_RGKN.transpose(2, 3))[:, :, None]
    dtx_RGJKP = (part.dt[..., None] * part.x).transpose(1, 2).unflatten(1, split)
    y_RGJQP = (decay_RGJQK * scores_RG1QK) @ dtx_RGJKP
    grown_RGJQ = torch.exp(total_RGJQ)
    # Heads of one group read the same C: their states side by side make one product.
    state_RGMN = ssm_RHPN.reshape(rows, groups, -1, ssm_RHPN.shape[3])
    carried = (c_RGQN @ state_RGMN.transpose(2, 3)).unflatten(3, (split[1], -1)).transpose(2, 3)
    y_RGJQP = torch.addcmul(y_RGJQP, carried, grown_RGJQ[..., None])
    y_RQHP = y_RGJQP.flatten(1, 2).transpose(1, 2)
    if not with_end:
        return y_RQHP, ssm_RHPN
    to_end_RGJK = torch.exp(total_RGJQ[..., -1:] - total_RGJQ)
    gained_RGMN = (dtx_RGJKP * to_end_RGJK[..., None]).transpose(3, 4).flatten(2, 3) @ b_RGKN
    kept_RH = grown_RGJQ[..., -1].flatten(1, 2)
    return y_RQHP, torch.addcmul(gained_RGMN.view(ssm_RHPN.shape), ssm_RHPN, kept_RH[..., None, None])


Convolve = Callable[[Tensor, nn.Conv1d], Tensor]
Scan = Callable[[ScanInputs, Tensor, int, bool], tuple[Tensor, list[Tensor]]]
Step = Callable[[ScanInputs, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class MambaKernels:
    """What computes a mixer's three parts; `twotower.model.kernels` puts faster functions in place of the plain."""

    convolve: Convolve
    scan: Scan
    step: Step


PLAIN = MambaKernels(convolve, scan, step)


@lru_cache(maxsize=64)
def _future(length: int, device: torch.device) -> Tensor:
    """True where a key lies after its query [Q,K]."""
    with torch.inference_mode(False):
        return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
