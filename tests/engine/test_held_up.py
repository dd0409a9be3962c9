"""Time in which a denoiser has sequences but nothing to step, by what they wait for."""

from typing import cast

from twotower.core import Request, RequestId
from twotower.decoding.stopping import Stopping
from twotower.engine.answer import Answer
from twotower.engine.held_up import HeldUp
from twotower.engine.modes.strategy import DenoiserMode, LedSequence


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def sequence(generated: int, committed: int = 0, closing: bool = False) -> LedSequence:
    request = Request(RequestId("r"), (5, 6), committed=(7,) * committed)
    answer = Answer(request, Stopping(request.params, 2), generated)
    return LedSequence(answer, 0, cast(DenoiserMode, None), closing=closing)


def test_only_time_without_a_step_counts_and_by_what_is_waited_for() -> None:
    clock = Clock()
    waits = HeldUp(clock)
    commits, prompt = sequence(16), sequence(0)
    for seconds, sequences, steps in (
        (1.0, [], False),  # nothing to do: idle
        (2.0, [commits], True),  # a step
        (0.5, [commits], False),
        (0.25, [commits], False),  # a tick that found nothing new
        (3.0, [commits], True),
        (0.125, [prompt], False),
        (5.0, [], False),  # it was cancelled: idle again
        (0.0625, [commits, prompt], False),
        (7.0, [sequence(16, closing=True)], False),  # waits for nothing but its release
    ):
        waits.note(sequences, steps)
        clock.now += seconds
    waits.note([], False)
    assert (waits.commit_s, waits.prompt_s) == (0.75, 0.1875)


def test_a_resumed_sequence_waits_for_its_prompt_first() -> None:
    clock = Clock()
    waits = HeldUp(clock)
    waits.note([sequence(32, committed=32)], False)
    clock.now = 1.0
    waits.note([], False)
    assert (waits.commit_s, waits.prompt_s) == (0.0, 1.0)
