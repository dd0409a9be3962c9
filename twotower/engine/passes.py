"""How an engine runs its tower: rows of tokens in, logits or hidden states out.

An eager pass costs a small model's host more in Python than in arithmetic, and a large model's GPU more in launches. So
frequent shapes can be *captured*: on a CPU as a recorded program (`engine/recorded.py`), on a GPU as a CUDA graph
(`engine/graphs.py`). A captured pass runs the same operations on the same numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import partial
from typing import Protocol

from torch import Tensor

from twotower.decoding.guess_kernels import guess_of, plain
from twotower.decoding.unmasking import Blocks, unmask_at
from twotower.model.cache import TowerCache
from twotower.model.rescan import KeptScans
from twotower.model.states import LayerStates
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.model.transfer import on_device

USUAL_WIDTH = 16  # the released block size
SHORT_PROMPT = 4 * USUAL_WIDTH  # prompts up to this length are captured: few widths, and mostly overhead
MAX_POSITIONS = 2048  # rows times width of a denoiser's pass at most: its activations must fit into memory
PROMPT_PARTS = 2  # parts of a longer prompt's pass, so that stepping rows wait for one part only


class Want(Enum):
    """What a pass is for: logits [R,L,V] fp32, hidden states [R,L,D], or a context tower's states alone. `STATES` skips
    everything after the last layer that keeps a state; its result [R,L,D] is undefined.
    """

    LOGITS = "logits"
    HIDDEN = "hidden states"
    STATES = "states"


class Passes(Protocol):
    """A tower's forwards over a cache."""

    def run(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        t: Sequence[float] | None = None,
        want: Want = Want.LOGITS,
    ) -> Tensor:
        """Run rows that read `tokens`, and return what is wanted.

        L is the longest row's length; positions after a shorter row's end are undefined. `t`: mask fractions, for a
        denoiser's block. A context tower's pass extends the slots' states; the caller advances the slots. The next
        `run` may overwrite the result.
        """
        ...

    def verify(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> tuple[Tensor, KeptScans | None]:
        """A context tower's `run` for hidden states over blocks that may be accepted only in part. The slots' states
        and lengths do not change; `TowerCache.settle` advances them with the scans.
        """
        ...

    def step(self, slots: Sequence[int], blocks: Blocks) -> Tensor:
        """A denoiser's step over `blocks`: its pass and its decision (`unmask_at`)."""
        ...

    def prepare(self, width: int) -> None:
        """Prepare the usual passes: blocks of `width`, and single tokens. Takes a moment, and saves it for the first
        requests.
        """
        ...


def padded(longest: int) -> int:
    """The width at which rows are captured: a single token, or a multiple of the usual block. So there are few forms,
    and 16 positions cost little more than a few.
    """
    return longest if longest == 1 else -(-longest // USUAL_WIDTH) * USUAL_WIDTH


def forward(
    tower: ContextTower | DenoiserTower, tokens_RL: Tensor, states: LayerStates, t_R: Tensor | None, want: Want
) -> Tensor:
    """One pass of either tower."""
    hidden: Tensor = tower(tokens_RL, states, want is Want.STATES if tower.causal else t_R)
    return tower.logits(hidden) if want is Want.LOGITS else hidden


def decided_apart(passes: Passes, tower: ContextTower | DenoiserTower, slots: Sequence[int], blocks: Blocks) -> Tensor:
    """A step as a pass and then a decision. The head sees masked positions only."""
    hidden_RLD = passes.run(slots, blocks.tokens, blocks.mask_fractions, Want.HIDDEN)
    guess = guess_of(tower)
    head = tower.logits if guess is plain else tower.raw_logits  # a kernel reads the head's output directly
    logits_at = partial(logits_of, head, hidden_RLD)
    vocab, width = tower.config.vocab_size, hidden_RLD.shape[1]
    return unmask_at(logits_at, blocks, width, vocab, tower.device, guess=guess)


def logits_of(head: Callable[[Tensor], Tensor], hidden_RLD: Tensor, places_P: Tensor) -> Tensor:
    """Logits [P,V] at these places of the flattened [R,L]."""
    return head(hidden_RLD.flatten(0, 1).index_select(0, places_P))


class EagerPasses:
    """Passes of any shape, run eagerly."""

    def __init__(self, tower: ContextTower | DenoiserTower, cache: TowerCache) -> None:
        self._tower, self._cache = tower, cache
        if not tower.causal:
            guess_of(tower)  # a kernel is compiled here, before anything is served

    def run(
        self,
        slots: Sequence[int],
        tokens: Sequence[Sequence[int]],
        t: Sequence[float] | None = None,
        want: Want = Want.LOGITS,
    ) -> Tensor:
        tower = self._tower
        tokens_RL, states = self._given(slots, tokens)
        return forward(tower, tokens_RL, states, None if t is None else on_device(t, tower.device), want)

    def verify(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> tuple[Tensor, KeptScans | None]:
        tokens_RL, lengths = self._padded(tokens)
        states = self._cache.extending(slots, lengths, tokens_RL.shape[1], keeps_scans=True)
        return forward(self._tower, tokens_RL, states, None, Want.HIDDEN), KeptScans.of(states.kept)

    def _given(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> tuple[Tensor, LayerStates]:
        tokens_RL, lengths = self._padded(tokens)
        states = self._cache.extending if self._tower.causal else self._cache.reading
        return tokens_RL, states(slots, lengths, tokens_RL.shape[1])

    def _padded(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        """The rows side by side, and how long each is."""
        lengths = [len(ids) for ids in tokens]
        width = max(lengths)
        return on_device([[*ids, *[0] * (width - len(ids))] for ids in tokens], self._tower.device), lengths

    def parts(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], count: int, want: Want) -> Iterator[Tensor]:
        """A context tower's `run` for hidden states or less, in `count` parts: the last part yields the result. Passes
        over other slots may run between the parts.
        """
        assert isinstance(self._tower, ContextTower) and want is not Want.LOGITS
        return self._tower.parts(*self._given(slots, tokens), count, want is Want.STATES)

    def step(self, slots: Sequence[int], blocks: Blocks) -> Tensor:
        return decided_apart(self, self._tower, slots, blocks)

    def prepare(self, width: int) -> None:
        """Nothing to prepare."""
