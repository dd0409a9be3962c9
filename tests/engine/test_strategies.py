"""The engine does what a mode's turns say, whether they come from a step or from the context tower's answer."""

from typing import Any, cast

import pytest
import torch

from twotower.core import BlockEvent, DecodingParams, Event, FinishReason, Mode, ReleasedEvent, Request, RequestId
from twotower.engine.answer import Cost
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.modes.strategy import NOTHING, DenoiserMode, LedSequence, Turn, Turns
from twotower.engine.settings import EngineSettings
from twotower.engine.steps import Rows, Step, take_all
from twotower.exchange.local import LocalExchange
from twotower.exchange.protocol import Delta
from twotower.testing import ScriptedContextTower, ScriptedDenoiserTower

SETTINGS = EngineSettings(max_sequences=4, max_sequence_length=64, prefill_chunk_tokens=4, capture="off")


class Drafts(DenoiserMode):
    """A step drafts two tokens and says none; once the context tower has read them, they are the answer's."""

    commits_first = False

    def __init__(self) -> None:
        self.answers: list[tuple[int, bool]] = []
        self.drafted: dict[int, list[int]] = {}

    def prompt(self, request: Request) -> tuple[int, ...]:
        return request.history

    def open(self, sequence: LedSequence) -> None:
        sequence.tokens = [7, 8]

    def launch(self, sequences: list[LedSequence]) -> list[Step[Turns]]:
        def turns(rows: Rows) -> Turns:
            self.drafted |= {s.number: [int(token) for token in row] for s, row in zip(sequences, rows, strict=True)}
            return [(s, Turn(commit=self.drafted[s.number])) for s in sequences]

        return [Step(torch.tensor([[float(token) for token in s.tokens] for s in sequences]), turns)]

    def answered(self, sequence: LedSequence, delta: Delta) -> Turn:
        self.answers.append((delta.end, delta.complete))
        drafted = self.drafted.pop(sequence.number, None)
        return NOTHING if drafted is None else Turn(0.5, drafted, Cost(num_steps=1))


def test_tokens_may_come_with_the_answer_to_a_commit() -> None:
    events: list[Event] = []
    context = ContextEngine(cast(Any, ScriptedContextTower()), SETTINGS, events.append)
    exchange = LocalExchange(context.cache, lambda: None)
    context.connect(exchange.port)
    engine = DenoiserEngine(cast(Any, ScriptedDenoiserTower()), exchange.link, SETTINGS, events.append)
    drafts = engine._modes[Mode.DIFFUSION] = Drafts()
    params = DecodingParams(max_new_tokens=5, block_size=2, ignore_eos=True)
    engine.add(Request(RequestId("r"), (5, 6, 7, 8, 9), params))
    with torch.inference_mode():
        for _ in range(20):
            context.tick(), engine.tick()
    assert drafts.answers == [(4, False), (5, True), (7, True), (9, True), (11, True)]
    blocks = [event for event in events if isinstance(event, BlockEvent)]
    assert [block.token_ids for block in blocks] == [(7, 8), (7, 8), (7,)]
    assert (blocks[-1].finish_reason, blocks[-1].margin) == (FinishReason.LENGTH, 0.5)
    assert isinstance(events[-1], ReleasedEvent) and context.cache.room.free_slots == SETTINGS.max_sequences


@pytest.mark.parametrize("shapes", [[], [(2, 3)], [(2, 3), (1, 4), (3, 1)]])
def test_every_step_takes_its_own_outcome(shapes: list[tuple[int, int]]) -> None:
    outcomes = [torch.rand(shape) for shape in shapes]
    assert take_all([Step(outcome, lambda rows: rows) for outcome in outcomes]) == [o.tolist() for o in outcomes]
