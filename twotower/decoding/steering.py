"""A request's changes to its logits before a token is chosen: biases, penalties, and no end before `min_tokens`.

The order is vLLM's: biases, the repetition penalty, the other two penalties, excluded tokens. A grammar is one reason
to exclude tokens. All of it follows from the request and the tokens before the position. So at a drafted position the
result is `ar`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from twotower.core import DecodingParams
from twotower.decoding.stopping import Stopping
from twotower.model.transfer import bits_on_device, on_device


class Matcher(Protocol):
    """The state of a text under a grammar, and the tokens that may come next.

    `fault`: the reason once no token may follow.
    """

    @property
    def fault(self) -> str | None: ...

    def follow(self, tokens: Sequence[int]) -> None:
        """Extend the text by these tokens."""
        ...

    def masks(self, draft: Sequence[int], first: int, count: int) -> Sequence[bytes]:
        """The allowed tokens after each of `count` prefixes of the draft; the first prefix has `first` tokens. One bit
        a token, tokens 0 to 7 in the first byte, padded to words of four bytes.
        """
        ...


class Steering:
    """The steering of one sequence. On the device it keeps at most two rows of the vocabulary's length.

    `fault`: the reason once no token can be chosen.
    """

    def __init__(
        self,
        params: DecodingParams,
        eos_token_id: int,
        prompt: Sequence[int],
        answer: Sequence[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        assert (params.structured_outputs is None) is (matcher is None), "a constraint, and no matcher for it"
        self._params, self._stops = params, sorted(Stopping(params, eos_token_id).stops)
        self._prompt, self._generated = tuple(prompt), len(answer)
        self._new = list(answer)  # not yet counted on the device
        self._counts_V: Tensor | None = None
        self._in_prompt_V: Tensor | None = None
        self._biases: tuple[Tensor, Tensor] | None = None
        self._matcher = matcher
        if matcher is not None:
            matcher.follow(answer)

    @property
    def fault(self) -> str | None:
        return None if self._matcher is None else self._matcher.fault

    def follow(self, tokens: Sequence[int]) -> None:
        """Extend the answer by these tokens."""
        self._generated += len(tokens)
        if self._params.penalises:
            self._new += tokens
        if self._matcher is not None:
            self._matcher.follow(tokens)

    def change(self, logits_NV: Tensor, draft: Sequence[int], first: int) -> None:
        """Change in place the logits after each prefix of `draft`; the first prefix has `first` tokens."""
        if self._params.logit_bias:
            ids_B, values_B = self._biased(logits_NV.device)
            logits_NV[:, ids_B] += values_B
        if self._params.penalises:
            self._penalise(logits_NV, draft, first)
        held = self._params.min_tokens - self._generated - first
        if held > 0 and self._stops:
            logits_NV[:held, on_device(self._stops, logits_NV.device)] = -torch.inf
        if self._matcher is not None:
            masks = self._matcher.masks(draft, first, len(logits_NV))
            logits_NV.masked_fill_(~allowed_tokens(masks, logits_NV.shape[1], logits_NV.device), -torch.inf)
            if self._matcher.fault is not None:
                logits_NV.fill_(-torch.inf)  # no token can be chosen, so the request fails

    def _biased(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._biases is None:
            ids, values = zip(*self._params.logit_bias, strict=True)
            self._biases = on_device(ids, device), on_device(values, device)
        return self._biases

    def _penalise(self, logits_NV: Tensor, draft: Sequence[int], first: int) -> None:
        params, counts_NV = self._params, self._counted(logits_NV, draft, first)
        if params.repetition_penalty != 1:
            seen_NV = (counts_NV > 0) | self._seen_in_prompt(logits_NV)
            penalised_NV = torch.where(
                logits_NV > 0, logits_NV / params.repetition_penalty, logits_NV * params.repetition_penalty
            )
            logits_NV.copy_(torch.where(seen_NV, penalised_NV, logits_NV))
        if params.frequency_penalty:
            logits_NV -= params.frequency_penalty * counts_NV
        if params.presence_penalty:
            logits_NV -= params.presence_penalty * (counts_NV > 0)

    def _counted(self, logits_NV: Tensor, draft: Sequence[int], first: int) -> Tensor:
        """How often each token is in the answer, after each prefix of the draft: small integers, exact in fp32."""
        rows, vocab = logits_NV.shape
        if self._counts_V is None:
            self._counts_V = logits_NV.new_zeros(vocab)
        if self._new:
            new_T = on_device(self._new, logits_NV.device)
            self._counts_V.index_add_(0, new_T, self._counts_V.new_ones(len(self._new)))
            self._new.clear()
        drafted = draft[: first + rows - 1]
        if not drafted:
            return self._counts_V.expand(rows, vocab)
        # The first row where a drafted token counts; it counts in all later rows.
        begins = on_device([max(0, place + 1 - first) for place in range(len(drafted))], logits_NV.device)
        added_NV, drafted_T = logits_NV.new_zeros(rows, vocab), on_device(list(drafted), logits_NV.device)
        added_NV.index_put_((begins, drafted_T), added_NV.new_ones(len(drafted)), accumulate=True)
        return added_NV.cumsum_(0).add_(self._counts_V)

    def _seen_in_prompt(self, logits_NV: Tensor) -> Tensor:
        if self._in_prompt_V is None:
            prompt_T = on_device(sorted(set(self._prompt)), logits_NV.device, torch.int64)
            seen_V = torch.zeros(logits_NV.shape[1], dtype=torch.bool, device=logits_NV.device)
            self._in_prompt_V = seen_V.index_fill_(0, prompt_T, True)
        return self._in_prompt_V


@dataclass(frozen=True, slots=True)
class Steered:
    """A position of a sequence: after its tokens so far, and after `ahead` tokens of this draft."""

    steering: Steering
    draft: Sequence[int] = ()
    ahead: int = 0


def allowed_tokens(masks: Sequence[bytes], vocab: int, device: torch.device) -> Tensor:
    """Bits as booleans [N,V], unpacked on the device."""
    words_NW = bits_on_device(masks, device)
    bits_NWB = words_NW[..., None] >> torch.arange(32, dtype=torch.int32, device=device) & 1
    return bits_NWB.flatten(1)[:, :vocab] != 0


def steer(logits_RV: Tensor, rows: Sequence[Steered | None]) -> Tensor:
    """The logits with each row's steering. Nothing is copied if no row has any; rows of one draft must be adjacent."""
    asked = [(row, steered) for row, steered in enumerate(rows) if steered is not None]
    if not asked:
        return logits_RV
    which_M = on_device([row for row, _ in asked], logits_RV.device)
    changed_MV, start = logits_RV.index_select(0, which_M), 0
    for _, group in groupby((steered for _, steered in asked), key=lambda steered: id(steered.steering)):
        positions = list(group)
        one, end = positions[0], start + len(positions)
        one.steering.change(changed_MV[start:end], one.draft, one.ahead)
        start = end
    return changed_MV if len(asked) == len(rows) else logits_RV.index_copy(0, which_M, changed_MV)
