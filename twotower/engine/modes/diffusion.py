"""`diffusion`: a block begins masked, steps fix some of its positions each, and a full one is committed.

With a grammar, each step chooses the first masked position under the grammar. Fixed positions are checked from left to
right; the first token that breaks the grammar is masked again, with all after it. The request's steps are followed by
at most one for each further position. Each of these fixes every masked position, and its first token holds.
"""

from collections.abc import Callable

from twotower.config import MASK_TOKEN_ID
from twotower.core import Mode, Request
from twotower.decoding.bounds import Bounds
from twotower.decoding.randomness import step_key
from twotower.decoding.unmasking import Decision, StepParams
from twotower.engine.answer import Cost
from twotower.engine.modes.block_steps import BlockSteps, StepTrace
from twotower.engine.modes.strategy import DenoiserMode, LedSequence, Turn, Turns
from twotower.engine.passes import Passes
from twotower.engine.steps import Step


class Diffusion(DenoiserMode):
    """The denoiser decides the tokens."""

    commits_first = False

    def __init__(self, passes: Passes, trace: Callable[[StepTrace], None] | None) -> None:
        self._steps = BlockSteps(passes, trace)

    def prompt(self, request: Request) -> tuple[int, ...]:
        return request.history

    def open(self, sequence: LedSequence) -> None:
        request = sequence.request
        _begin_block(sequence, len(request.committed) // request.params.block_size, sequence.answer.room)

    def launch(self, sequences: list[LedSequence]) -> list[Step[Turns]]:
        return self._steps.launch(sequences, _step_params, _turn)


def _turn(sequence: LedSequence, decision: Decision) -> Turn:
    _mask_what_breaks_the_grammar(sequence)
    if any(sequence.masked):
        return Turn(decision.margin)
    by_auto = int(sequence.request.params.mode is Mode.AUTO)
    cost = Cost(sequence.step, num_diffusion_blocks=by_auto)
    confidence = [sequence.confidence[place] for place in range(len(sequence.tokens))] if sequence.confidence else ()
    full = Turn(decision.margin, sequence.tokens, cost, commit=sequence.tokens, confidence=confidence)
    _begin_block(sequence, sequence.block + 1, sequence.answer.room - len(sequence.tokens))
    return full


def _mask_what_breaks_the_grammar(sequence: LedSequence) -> None:
    """Mask the first token that breaks the grammar, and all after it, because those were chosen beside it."""
    broken = None if sequence.certain is None else sequence.certain.extend(sequence.tokens, sequence.masked)
    if broken is not None:
        behind = len(sequence.tokens) - broken
        sequence.tokens[broken:], sequence.masked[broken:] = [MASK_TOKEN_ID] * behind, [True] * behind


def _begin_block(sequence: LedSequence, block: int, room: int) -> None:
    """`room`: the number of tokens that the answer may still take."""
    size = sequence.request.params.block_size
    sequence.tokens, sequence.masked = [MASK_TOKEN_ID] * size, [True] * size
    sequence.step, sequence.block, sequence.confidence = 0, block, {}
    if sequence.certain is not None:
        sequence.certain.begin_block(room)


def _step_params(sequence: LedSequence) -> StepParams:
    params = sequence.request.params
    key = step_key(params.seed, sequence.block, sequence.step) if params.samples else 0
    # With steps_per_block 1 (or on the last step) everything still masked is fixed.
    steps_left = max(params.steps_per_block - sequence.step, 1)
    allowed = None if sequence.certain is None else sequence.certain.allowed
    return StepParams(params.confidence_threshold, steps_left, params.temperature, key, allowed, Bounds.of(params))
