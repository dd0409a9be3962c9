"""What an answer that a stop string ends has cost does not depend on how many of its tokens came together."""

from collections.abc import AsyncGenerator

import pytest

from cluster.runs.deadline import Deadline
from cluster.runs.generation import Ask, Generation
from tests.cluster.fakes import ByteTokenizer, ScriptedCells, served_model, tokens
from twotower.core import AnswerEvent, BlockEvent, FinishReason, Mode, Request, RequestId

ANSWER = tokens("All good things come.")


class Joined(ScriptedCells):
    """The tokens of a causal mode, `together` at a time."""

    together = 1

    async def generate(self, request: Request, timeout_s: float) -> AsyncGenerator[AnswerEvent, None]:
        steps = 1 if request.params.mode is Mode.MOCK_AR else 0
        for start in range(0, len(ANSWER), self.together):
            part = ANSWER[start : start + self.together]
            last = FinishReason.LENGTH if start + len(part) == len(ANSWER) else None
            yield BlockEvent(request.id, start, part, steps * len(part), len(part), last)


@pytest.mark.parametrize(("mode", "steps"), [("ar", 0), ("mock_ar", 1)])
@pytest.mark.parametrize("together", [1, 2, 7, 21])
async def test_usage_alone_and_joined(mode: str, steps: int, together: int) -> None:
    cells = Joined()
    cells.together = together
    service = Generation(served_model(ByteTokenizer()), cells)
    deadline = Deadline.after(60)
    answer = await (await service.run(service.check(Ask("Hi", {"mode": mode}, stop="th")), deadline)).whole()
    assert answer.text == "All good " and answer.finish_reason is FinishReason.STOP
    usage = answer.usage
    assert (usage.completion_tokens, usage.num_blocks, usage.num_steps) == (11, 11, 11 * steps)


def test_a_block_costs_the_whole_of_it() -> None:
    block = BlockEvent(RequestId("r"), 0, (5, 6, 7, 8), 3, 1)
    assert (block.first(2).token_ids, block.first(2).num_steps, block.first(2).num_blocks) == ((5, 6), 3, 1)
    assert block.first(4) is block
