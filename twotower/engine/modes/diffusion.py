"""`diffusion`: a block begins masked, steps fix some of its positions each, and a full one is committed."""

from collections.abc import Callable

from twotower.config import MASK_TOKEN_ID
from twotower.core import Mode, Request
from twotower.decoding.randomness import step_key
from twotower.decoding.unmasking import Decision, StepParams
from twotower.engine.answer import Cost
from twotower.engine.modes.block_steps import BlockSteps, StepTrace
from twotower.engine.modes.strategy import DenoiserMode, LedSequence, Turn, Turns
from twotower.engine.passes import Passes
from twotower.engine.steps import Step


class Diffusion(DenoiserMode):
    """What the denoiser fills a block with stands."""

    commits_first = False

    def __init__(self, passes: Passes, trace: Callable[[StepTrace], None] | None) -> None:
        self._steps = BlockSteps(passes, trace)

    def prompt(self, request: Request) -> tuple[int, ...]:
        return request.history

    def open(self, sequence: LedSequence) -> None:
        request = sequence.request
        _begin_block(sequence, len(request.committed) // request.params.block_size)

    def launch(self, sequences: list[LedSequence]) -> list[Step[Turns]]:
        return self._steps.launch(sequences, _step_params, _turn)


def _turn(sequence: LedSequence, decision: Decision) -> Turn:
    if any(sequence.masked):
        return Turn(decision.margin)
    by_auto = int(sequence.request.params.mode is Mode.AUTO)
    cost = Cost(sequence.step, num_diffusion_blocks=by_auto)
    confidence = [sequence.confidence[place] for place in range(len(sequence.tokens))] if sequence.confidence else ()
    full = Turn(decision.margin, sequence.tokens, cost, commit=sequence.tokens, confidence=confidence)
    _begin_block(sequence, sequence.block + 1)
    return full


def _begin_block(sequence: LedSequence, block: int) -> None:
    size = sequence.request.params.block_size
    sequence.tokens, sequence.masked = [MASK_TOKEN_ID] * size, [True] * size
    sequence.step, sequence.block, sequence.confidence = 0, block, {}


def _step_params(sequence: LedSequence) -> StepParams:
    params = sequence.request.params
    key = step_key(params.seed, sequence.block, sequence.step) if params.samples else 0
    # With steps_per_block 1 (or on the last step) everything still masked is fixed.
    steps_left = max(params.steps_per_block - sequence.step, 1)
    return StepParams(params.confidence_threshold, steps_left, params.temperature, key)
