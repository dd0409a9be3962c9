"""What operators see of requests: numbers that are those clients are told, and nothing of any text."""

import asyncio

import pytest
from pydantic_core import to_json

from cluster.board.runs_seen import MOST_SHOWN, STRIP, RunsSeen
from cluster.runs.deadline import Deadline
from cluster.runs.generation import Ask
from cluster.runs.record import Record
from cluster.runs.run import Generating, Means, Patience
from tests.cluster.fakes import BLOCK, FINGERPRINT, ByteTokenizer, ScriptedCells, generation, tokens
from tests.cluster.runs.script import GONE, WELL, Script, Stay
from twotower.core import BlockEvent, DecodingParams, Mode, Request, RequestId
from twotower.errors import Cancelled, DeadlineExceeded, InvalidRequest, NumericalError, Overloaded
from twotower.text.answer_text import AnswerText

ANSWER = tokens("one two three four")


class Seen:
    """An observer on a clock of the test's, and what it has noted."""

    def __init__(self) -> None:
        self.now, self.noted = 100.0, list[tuple[str, str]]()
        self.runs = RunsSeen(lambda kind, text: self.noted.append((kind, text)), lambda: self.now)

    def run(self, script: Script, mode: Mode = Mode.DIFFUSION) -> Generating:
        request = Request(RequestId("req-1"), (5, 6, 7), DecodingParams(mode, block_size=BLOCK, max_new_tokens=40))
        means = Means(script, Patience(3, 60.0), (self.runs,))
        record = Record(request, FINGERPRINT, "a label")
        return Generating(record, Deadline.after(60.0), means, AnswerText(ByteTokenizer(), ()))


async def test_counts_are_those_of_the_usage() -> None:
    seen = Seen()
    usage = (await seen.run(Script(ANSWER, [WELL])).whole()).usage
    counts, firsts = seen.runs.take()
    tokens_told = float(usage.completion_tokens)
    assert counts == {"tokens": tokens_told, "step_tokens": tokens_told, "steps": usage.num_steps, "ended": 1.0}
    assert sum(firsts.values()) == 1 and seen.runs.take() == ({}, {}), "once"


async def test_a_run_that_is_under_way() -> None:
    seen = Seen()
    run = seen.run(Script(ANSWER, [WELL]))
    await anext(run)
    seen.now += 2.5
    [row] = seen.runs.rows()
    event = run.usage
    assert (row.id, row.mode, row.cell, row.age_s, row.quiet_s) == (
        "req-1",
        "diffusion",
        run.record.attempts[-1],
        2.5,
        2.5,
    )
    assert (row.prompt_tokens, row.tokens, row.most_tokens) == (3, BLOCK, 40)
    assert (row.blocks, row.most_blocks, row.steps, row.steps_of) == (1, 10, event.num_steps, (event.num_steps,))
    await run.aclose()
    assert seen.runs.rows() == () and seen.noted == [], "a client that leaves is no failure"
    assert "failed" not in seen.runs.take()[0]


async def test_nothing_that_a_client_wrote_is_told() -> None:
    seen = Seen()
    run = seen.run(Script(ANSWER, [WELL]))
    await anext(run)
    told = to_json(seen.runs.rows()).decode()
    assert "label" not in told and "token_ids" not in told and str(list(ANSWER[:2]))[1:-1] not in told
    await run.aclose()


async def test_a_resume_and_a_failure_are_noted() -> None:
    seen = Seen()
    await seen.run(Script(ANSWER, [Stay(events=2, error=GONE), WELL])).whole()
    assert [kind for kind, _ in seen.noted] == ["moved"] and seen.runs.take()[0]["resumed"] == 1
    with pytest.raises(NumericalError):
        await seen.run(Script(ANSWER, [Stay(error=NumericalError("NaN"))])).whole()
    with pytest.raises(DeadlineExceeded):
        await seen.run(Script(ANSWER, [Stay(error=DeadlineExceeded("late"))])).whole()
    assert seen.noted[1:] == [("failed", "request failed with ABORTED"), ("late", "request not done in time")]
    assert seen.runs.take()[0]["failed"] == 2


def test_refusals_for_want_of_room_are_noted_and_wrong_calls_counted() -> None:
    seen = Seen()
    for error in (Overloaded("full"), InvalidRequest.of("prompt", "wrong"), Cancelled("left")):
        seen.runs.refused(error)
    assert seen.runs.take()[0] == {"refused": 2.0} and len(seen.noted) == 1


def test_rows_and_strips_are_bounded() -> None:
    seen = Seen()
    for number in range(MOST_SHOWN + 5):
        request = Request(RequestId(f"req-{number}"), (5,), DecodingParams())
        record = Record(request, FINGERPRINT)
        seen.runs.opened(record)
        for block in range(STRIP + 3):
            seen.runs.event(record, BlockEvent(request.id, 16 * block, (5,) * 16, block, 1))
    rows = seen.runs.rows()
    assert len(rows) == MOST_SHOWN and rows[0].id == "req-0" and seen.runs.running == MOST_SHOWN + 5
    assert rows[0].steps_of == tuple(range(3, STRIP + 3))


async def test_both_faces_tell_it() -> None:
    seen, cells = Seen(), ScriptedCells()
    service = generation(cells, observers=(seen.runs,))
    asked = [service.run(service.check(Ask("Hi", {"mode": mode})), service.deadline()) for mode in Mode]
    await asyncio.gather(*(run.whole() for run in await asyncio.gather(*asked)))
    counts, _ = seen.runs.take()
    assert counts["ended"] == len(Mode)
    assert counts["tokens"] == len(Mode) * len(cells.answer) == len(Mode) * counts["step_tokens"]
