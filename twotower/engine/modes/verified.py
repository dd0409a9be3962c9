"""`verified`: the denoiser drafts a block in a few steps, the context tower accepts what `ar` would have written.

A block begins with the token that was decided last. The draft follows it; a wrong draft costs only time. The context
tower's answer to a block is a round: the accepted part of the draft and the token that it wrote itself. If drafts do
not pay (`Drafts`), a block is only the decided token, and the context tower continues after it as in `ar`.
"""

from collections.abc import Callable, Sequence

from twotower.config import MASK_TOKEN_ID
from twotower.core import Mode, Request, RoundEvent
from twotower.decoding.unmasking import Decision, StepParams
from twotower.engine.answer import Cost
from twotower.engine.modes.block_steps import BlockSteps, StepTrace
from twotower.engine.modes.strategy import NOTHING, DenoiserMode, LedSequence, Turn, Turns
from twotower.engine.passes import Passes
from twotower.engine.steps import Step
from twotower.exchange.protocol import Delta, Verifying


class Verified(DenoiserMode):
    """The context tower's own tokens, several a round."""

    commits_first = False

    def __init__(self, passes: Passes, trace: Callable[[StepTrace], None] | None) -> None:
        self._steps = BlockSteps(passes, trace)

    def prompt(self, request: Request) -> tuple[int, ...]:
        return request.history

    def verifying(self, request: Request) -> Verifying:
        return Verifying(request.params, len(request.prompt_token_ids))

    def open(self, sequence: LedSequence) -> None:
        """Nothing is certain before the prompt is read."""

    def launch(self, sequences: list[LedSequence]) -> list[Step[Turns]]:
        return self._steps.launch(sequences, _step_params, _turn)

    def answered(self, sequence: LedSequence, delta: Delta) -> Turn:
        if delta.decided is None:
            return NOTHING  # a part of the prompt
        token = delta.decided.token
        tokens, cost, told = [token], Cost(num_blocks=0), None
        if sequence.step:
            accepted = sequence.tokens[1 : delta.end - delta.start]
            tokens, cost = [*accepted, token], Cost(sequence.step, 1, sequence.drafted, len(accepted))
            told = _told(sequence, accepted, token) if sequence.request.trace else None
            sequence.drafting.ended(sequence.step, len(accepted))
        elif sequence.tokens:
            by_auto = sequence.request.params.mode is Mode.AUTO
            tokens, cost = [*delta.decided.written, token], Cost(num_ar_blocks=int(by_auto))
            told = _told(sequence, [], token) if sequence.request.trace and not by_auto else None
            sequence.drafting.ended(0, len(tokens))
        drafted, room = sequence.step > 0, sequence.answer.room - len(tokens)
        _begin_block(sequence, token)
        if _wanted(sequence, room) > 1:
            alone = sequence.drafting.alone(room)
            commit = [token] if alone else ()
        else:  # nothing to draft: behind drafts it shares their pass, behind tokens alone theirs
            alone, commit = int(not drafted), [token]
        margin, rated = delta.decided.margin, delta.likelihoods
        return Turn(margin, tokens, cost, commit, trace=told, alone=min(alone, room), likelihoods=rated)


def _begin_block(sequence: LedSequence, token: int) -> None:
    masks = sequence.request.params.block_size - 1
    sequence.tokens, sequence.masked = [token, *[MASK_TOKEN_ID] * masks], [False, *[True] * masks]
    sequence.block, sequence.step, sequence.drafted, sequence.known = sequence.block + 1, 0, 0, 1


def _told(sequence: LedSequence, accepted: Sequence[int], token: int) -> RoundEvent:
    draft = tuple(sequence.tokens[1 : 1 + sequence.drafted])
    return RoundEvent(sequence.request.id, sequence.answer.generated, draft, len(accepted), token)


def _wanted(sequence: LedSequence, room: int) -> int:
    """How many tokens of the block are worth reading, if the answer may take so many more. Reading n tokens gives at
    most n. Nothing after a token that ends the answer is needed.
    """
    most = min(len(sequence.tokens), room)
    for place in range(1, most):
        if not sequence.masked[place] and sequence.answer.stopping.ends(sequence.tokens[place]):
            return place
    return most


def _turn(sequence: LedSequence, decision: Decision) -> Turn:
    """The draft's confidence decides nothing, so its margin does not count."""
    wanted = _wanted(sequence, sequence.answer.room)
    if any(sequence.masked[:wanted]):
        return NOTHING
    sequence.drafted = wanted - 1
    return Turn(commit=sequence.tokens[:wanted])


def _step_params(sequence: LedSequence) -> StepParams:
    """Greedy at any temperature: only the context tower draws."""
    params = sequence.request.params
    return StepParams(params.draft_threshold, max(params.draft_steps - sequence.step, 1))
