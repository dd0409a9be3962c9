"""The released script's loop: one request, one tower at a time, caches that grow by concatenation.

FROZEN. This is the fixed baseline of later results. Change it only if it is wrong, and say so in the next result. It
shares the towers with the library, so it gains from a faster forward, but not from engines, scheduling, paging and
exchange. It keeps the released structure (docs/semantics.md): two-pass prefill, snapshot of the Mamba states, extension
after the last block, whole blocks, no cut at EOS.

Shape suffixes as in `twotower.model.states`; R is always 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twotower.config import ModelConfig
from twotower.core import Mode, Request
from twotower.decoding.unmasking import MASK_TOKEN_ID
from twotower.model.states import WithoutPages
from twotower.model.tower import ContextTower, DenoiserTower

_BANNED = -1e12


@dataclass(frozen=True, slots=True)
class NaiveCache:
    """What the context tower has read, a tensor per layer. Never written in place: every pass makes a new one.

    conv [1,K,C], ssm [1,H,P,N], keys and values [1,T,S,E], by layer index.
    """

    conv: dict[int, Tensor]
    ssm: dict[int, Tensor]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]

    @classmethod
    def empty(cls, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> "NaiveCache":
        window = torch.zeros(1, config.conv_kernel, config.conv_channels, device=device, dtype=dtype)
        heads, width, state = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
        ssm = torch.zeros(1, heads, width, state, device=device)
        none_yet = torch.zeros(1, 0, config.num_key_value_heads, config.head_dim, device=device, dtype=dtype)
        mamba, attention = config.layers_of("M"), config.layers_of("*")
        return cls(
            dict.fromkeys(mamba, window),
            dict.fromkeys(mamba, ssm),
            dict.fromkeys(attention, none_yet),
            dict.fromkeys(attention, none_yet),
        )

    @property
    def length(self) -> int:
        return next((keys.shape[1] for keys in self.keys.values()), 0)

    def without_last_token(self) -> "NaiveCache":
        """Keys and values without the newest position; the Mamba states stay what they are."""
        return replace(
            self,
            keys={layer: keys[:, :-1] for layer, keys in self.keys.items()},
            values={layer: values[:, :-1] for layer, values in self.values.items()},
        )


class ExtendPass(WithoutPages):
    """LayerStates of a causal pass of the context tower. `cache` is the old cache until each layer has run."""

    updates = True
    kept = None
    lengths_R = None

    def __init__(self, cache: NaiveCache, width: int, device: torch.device) -> None:
        self.cache = NaiveCache(dict(cache.conv), dict(cache.ssm), dict(cache.keys), dict(cache.values))
        seen = cache.length
        self.mask_RLT = torch.ones(1, width, seen + width, dtype=torch.bool, device=device).tril(seen)
        self.starts_R = torch.full((1,), seen, device=device)

    def mamba(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.cache.conv[layer], self.cache.ssm[layer]

    def put_mamba(self, layer: int, conv_RKC: Tensor, ssm_RHPN: Tensor) -> None:
        self.cache.conv[layer], self.cache.ssm[layer] = conv_RKC, ssm_RHPN

    def keys_values(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.cache.keys[layer] = torch.cat([self.cache.keys[layer], keys_RLSE], dim=1)
        values = self.cache.values[layer] = torch.cat([self.cache.values[layer], values_RLSE], dim=1)
        return keys, values


class ReadPass(WithoutPages):
    """LayerStates of a denoiser pass: every position of the block sees the cache and the whole block."""

    updates = False
    kept = None
    lengths_R = None

    def __init__(self, cache: NaiveCache, width: int, device: torch.device) -> None:
        self.cache = cache
        self.mask_RLT = torch.ones(1, width, cache.length + width, dtype=torch.bool, device=device)
        self.starts_R = torch.full((1,), cache.length, device=device)

    def mamba(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.cache.conv[layer], self.cache.ssm[layer]

    def put_mamba(self, layer: int, conv_RKC: Tensor, ssm_RHPN: Tensor) -> None:
        raise AssertionError("a denoiser pass changes no state")

    def keys_values(self, layer: int, keys_RLSE: Tensor, values_RLSE: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.cat([self.cache.keys[layer], keys_RLSE], dim=1)
        return keys, torch.cat([self.cache.values[layer], values_RLSE], dim=1)


@dataclass(frozen=True, slots=True)
class NaiveBlock:
    """Tokens that were fixed together, and the denoiser forwards that took (0 in `ar`)."""

    token_ids: tuple[int, ...]
    num_steps: int


class NaiveLoop:
    """Decodes one greedy request after the other. Two objects may share towers."""

    def __init__(self, context: ContextTower, denoiser: DenoiserTower) -> None:
        self.context, self.denoiser, self.device = context, denoiser, context.device

    def generate(self, request: Request) -> Iterator[NaiveBlock]:
        """Blocks (single tokens in `ar` and `mock_ar`, accepted ones in `verified`) as they are fixed.

        Raises ValueError for sampling and, in `diffusion`, for a length that is no multiple of the block size; the
        released code asserts the latter.
        """
        params = request.params
        if params.temperature > 0:
            raise ValueError(f"temperature: got {params.temperature}, wanted 0: the naive loop is greedy")
        if params.mode is Mode.DIFFUSION and params.max_new_tokens % params.block_size:
            raise ValueError(f"max_new_tokens: got {params.max_new_tokens}, wanted a multiple of {params.block_size}")
        loops = {
            Mode.DIFFUSION: self._diffusion,
            Mode.AR: self._ar,
            Mode.MOCK_AR: self._mock_ar,
            Mode.VERIFIED: self._verified,
        }
        blocks = loops[params.mode](request)
        while True:
            with torch.inference_mode():
                block = next(blocks, None)
            if block is None:
                return
            yield block

    def prefill(self, prompt: Sequence[int]) -> tuple[NaiveCache, NaiveCache, Tensor]:
        """Read a prompt in two passes. Returns the cache, the one before the last token, and the last logits [1,V]."""
        before = NaiveCache.empty(self.context.config, self.device, self.context.dtype)
        if len(prompt) > 1:
            before, _ = self.extend(before, prompt[:-1])
        cache, hidden_RLD = self.extend(before, prompt[-1:])
        return cache, before, self.context.logits(hidden_RLD[:, -1])

    def extend(self, cache: NaiveCache, token_ids: Sequence[int]) -> tuple[NaiveCache, Tensor]:
        """The context tower reads these tokens in one causal pass. Returns the new cache and hidden states [1,L,D]."""
        states = ExtendPass(cache, len(token_ids), self.device)
        hidden_RLD: Tensor = self.context(torch.tensor([list(token_ids)], device=self.device), states)
        return states.cache, hidden_RLD

    def denoise(self, cache: NaiveCache, tokens_L: Tensor, t: float | None) -> Tensor:
        """One denoiser pass over a block. Returns hidden states [1,L,D]."""
        t_R = None if t is None else torch.tensor([t], device=self.device)
        hidden_RLD: Tensor = self.denoiser(tokens_L[None], ReadPass(cache, len(tokens_L), self.device), t_R)
        return hidden_RLD

    def _diffusion(self, request: Request) -> Iterator[NaiveBlock]:
        params = request.params
        cache, _, _ = self.prefill(request.prompt_token_ids)
        for _ in range(params.max_new_tokens // params.block_size):
            block = self._fill_block(cache, request)
            yield block
            cache, _ = self.extend(cache, block.token_ids)
            if self._ends(request, block):
                return

    def _fill_block(self, cache: NaiveCache, request: Request) -> NaiveBlock:
        params = request.params
        tokens_L = torch.full((params.block_size,), MASK_TOKEN_ID, device=self.device)
        masked_L, num_steps = tokens_L == MASK_TOKEN_ID, 0
        while masked_L.any():
            steps_left = params.steps_per_block - num_steps
            tokens_L, masked_L = self._step(cache, tokens_L, masked_L, params.confidence_threshold, steps_left)
            num_steps += 1
        return NaiveBlock(tuple(tokens_L.tolist()), num_steps)

    def _step(
        self, cache: NaiveCache, tokens_L: Tensor, masked_L: Tensor, threshold: float, steps_left: int
    ) -> tuple[Tensor, Tensor]:
        """The tokens after a step, and which of them are masked still."""
        hidden_RLD = self.denoise(cache, tokens_L, int(masked_L.sum()) / len(tokens_L))
        tokens_L = _unmask(self.denoiser.logits(hidden_RLD)[0], tokens_L, masked_L, threshold, max(steps_left, 1))
        return tokens_L, masked_L & (tokens_L == MASK_TOKEN_ID)

    def _verified(self, request: Request) -> Iterator[NaiveBlock]:
        """The plain way: what stands of a block is read again, alone."""
        params, told = request.params, 1
        cache, _, logits_RV = self.prefill(request.prompt_token_ids)
        block = NaiveBlock((int(logits_RV.argmax(-1)),), 0)
        yield block
        while told < params.max_new_tokens and not self._ends(request, block):
            draft, num_steps = self._draft(cache, request, block.token_ids[-1], params.max_new_tokens - told)
            _, hidden_RLD = self.extend(cache, draft)
            chosen = self.context.logits(hidden_RLD)[0].argmax(-1).tolist()
            cut = 1
            while cut < len(draft) and draft[cut] == chosen[cut - 1]:
                cut += 1
            cache, _ = self.extend(cache, draft[:cut])
            block = NaiveBlock(tuple(chosen[:cut]), num_steps)
            yield block
            told += cut

    def _draft(self, cache: NaiveCache, request: Request, first: int, room: int) -> tuple[list[int], int]:
        """A block that begins with `first`, as far as it is worth reading, and the steps that took."""
        params, num_steps = request.params, 0
        tokens_L = torch.tensor([first, *[MASK_TOKEN_ID] * (params.block_size - 1)], device=self.device)
        masked_L = torch.arange(params.block_size, device=self.device) > 0
        stops = {*params.stop_token_ids, *([] if params.ignore_eos else [self.context.config.eos_token_id])}
        while True:
            wanted = min(params.block_size, room)
            ends = [n for n in range(1, wanted) if not masked_L[n] and int(tokens_L[n]) in stops]
            wanted = min([wanted, *ends])
            if not masked_L[:wanted].any():
                return tokens_L[:wanted].tolist(), num_steps
            steps_left = params.draft_steps - num_steps
            tokens_L, masked_L = self._step(cache, tokens_L, masked_L, params.draft_threshold, steps_left)
            num_steps += 1

    def _ar(self, request: Request) -> Iterator[NaiveBlock]:
        cache, _, logits_RV = self.prefill(request.prompt_token_ids)
        for _ in range(request.params.max_new_tokens):
            block = NaiveBlock((int(logits_RV.argmax(-1)),), 0)
            yield block
            cache, hidden_RLD = self.extend(cache, block.token_ids)
            logits_RV = self.context.logits(hidden_RLD[:, -1])
            if self._ends(request, block):
                return

    def _mock_ar(self, request: Request) -> Iterator[NaiveBlock]:
        cache, before, _ = self.prefill(request.prompt_token_ids)
        token = request.prompt_token_ids[-1]
        for _ in range(request.params.max_new_tokens):
            seed = replace(before, keys=cache.keys, values=cache.values).without_last_token()
            hidden_RLD = self.denoise(seed, torch.tensor([token], device=self.device), None)
            token = int(self.denoiser.logits(hidden_RLD[:, -1]).argmax(-1))
            block = NaiveBlock((token,), 1)
            yield block
            before = cache
            cache, _ = self.extend(cache, block.token_ids)
            if self._ends(request, block):
                return

    def _ends(self, request: Request, block: NaiveBlock) -> bool:
        stops = set(request.params.stop_token_ids)
        if not request.params.ignore_eos:
            stops.add(self.context.config.eos_token_id)
        return not stops.isdisjoint(block.token_ids)


def _unmask(logits_LV: Tensor, tokens_L: Tensor, masked_L: Tensor, threshold: float, steps_left: int) -> Tensor:
    """Keep the most confident predictions: all above the threshold, at least one, enough to finish in time."""
    logits_LV[:, MASK_TOKEN_ID] = _BANNED
    probabilities_LV = logits_LV.softmax(-1)
    predicted_L = probabilities_LV.argmax(-1)
    confidence_L = probabilities_LV.gather(1, predicted_L[:, None])[:, 0]
    predicted_L = torch.where(masked_L, predicted_L, tokens_L)
    if steps_left == 1:
        return predicted_L
    num_masked = int(masked_L.sum())
    above = int(((confidence_L > threshold) & masked_L).sum())
    count = min(max(above, 1, -(-num_masked // steps_left)), num_masked)
    # Ascending, so the least confident come first; positions that are fixed already sort behind all masked ones.
    order_L = torch.where(masked_L, confidence_L, torch.inf).sort(stable=True).indices
    predicted_L[order_L[: num_masked - count]] = MASK_TOKEN_ID
    return predicted_L
