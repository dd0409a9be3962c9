"""Numbers of runs are those that clients are told, wherever their cells die."""

import asyncio
from contextlib import ExitStack

import pytest

from cluster.runs.deadline import Deadline
from cluster.runs.generation import Ask
from cluster.runs.observers import Observer
from cluster.runs.record import Gap, Record
from cluster.runs.run import Generating, Means, Patience, Scoring
from cluster.watch import router_metrics as metrics
from cluster.watch.run_metrics import RunMetrics
from cluster.watch.tally import Tally
from tests.cluster.fakes import BLOCK, FINGERPRINT, ByteTokenizer, ScriptedCells, generation, tokens
from tests.cluster.runs.script import GONE, WELL, Script, Stay
from tests.cluster.watch.noted import Noted
from twotower.core import AnswerEvent, DecodingParams, Mode, Request, RequestId, ScoreRequest
from twotower.errors import InvalidRequest, NumericalError, Overloaded, Unavailable
from twotower.text.answer_text import AnswerText

ANSWER = tokens("one two three stop four")


class Ticking(Observer):
    """A clock on which each event comes a second after the last."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def first_event(self, record: Record, event: AnswerEvent) -> None:
        self.now += 1.0

    def event(self, record: Record, event: AnswerEvent) -> None:
        self.now += 1.0 if record.usage.num_blocks else 0.0


class Watching:
    """Runs over a script, with their metrics on a scripted clock."""

    def __init__(self, script: Script, mode: Mode = Mode.DIFFUSION, stop: tuple[str, ...] = ()) -> None:
        self.tally, self.clock = Tally(), Ticking()
        self.metrics = RunMetrics(self.tally, self.clock)
        self.means = Means(script, Patience(3, 60.0), (self.clock, self.metrics))
        request = Request(RequestId("r"), (5, 6, 7), DecodingParams(mode, block_size=BLOCK))
        record = Record(request, FINGERPRINT, "gateway")
        self.run = Generating(record, Deadline.after(60.0), self.means, AnswerText(ByteTokenizer(), stop))

    @property
    def noted(self) -> Noted:
        return Noted(self.tally)


async def test_a_run_that_ends_well() -> None:
    watching = Watching(Script(ANSWER, [WELL]))
    usage = (await watching.run.whole()).usage
    noted = watching.noted
    assert noted.of(metrics.SUCCESS) == {("diffusion", "length"): 1} and not noted.of(metrics.FAILURE)
    assert noted.of(metrics.PROMPT_TOKENS) == {("diffusion",): 3}
    assert noted.of(metrics.TOKENS) == {("diffusion",): len(ANSWER)} == {("diffusion",): usage.completion_tokens}
    assert noted.of(metrics.BLOCKS) == {("diffusion",): usage.num_blocks}
    assert noted.of(metrics.STEPS) == {(): usage.num_steps}
    assert noted.of(metrics.CANVAS) == {(): usage.num_steps * BLOCK}
    assert noted.of(metrics.COMMITTED) == {(): usage.completion_tokens}
    following = usage.num_blocks - 1
    assert noted.observed == {
        (metrics.QUEUE_TIME, ("diffusion",)): [0.0],
        (metrics.FIRST_TOKEN, ("diffusion",)): [1.0],
        (metrics.BETWEEN_BLOCKS, ("diffusion",)): [1.0] * following,
        (metrics.BLOCK_STEPS, ()): [2.0] * usage.num_blocks,
        (metrics.LATENCY, ("diffusion",)): [1.0 + following],
        (metrics.TOKEN_TIME, ("diffusion",)): [following / (len(ANSWER) - BLOCK)],
    }


async def test_tokens_are_counted_while_a_run_goes_on_and_each_once() -> None:
    watching, total = Watching(Script(ANSWER, [WELL])), 0.0
    async for chunk in watching.run:
        watching.metrics.read()
        total += watching.noted.of(metrics.TOKENS).get(("diffusion",), 0)
        assert total == chunk.usage.completion_tokens
    assert total == len(ANSWER) and not watching.noted.of(metrics.TOKENS)


async def test_what_a_stop_string_cut_off_is_not_counted() -> None:
    watching = Watching(Script(ANSWER, [WELL]), stop=("stop",))
    whole = await watching.run.whole()
    noted = watching.noted
    assert noted.of(metrics.SUCCESS) == {("diffusion", "stop"): 1}
    assert noted.of(metrics.TOKENS) == {("diffusion",): len(whole.token_ids)}
    assert len(whole.token_ids) < len(whole.record.committed)


@pytest.mark.parametrize(("error", "reason"), [(GONE, "cell_lost"), (Gap("a gap"), "gap")])
async def test_a_resumed_run_counts_each_token_once(error: Unavailable, reason: str) -> None:
    watching = Watching(Script(ANSWER, [Stay(2, error), WELL]))
    await watching.run.whole()
    noted = watching.noted
    assert noted.of(metrics.TOKENS) == {("diffusion",): len(ANSWER)}
    assert noted.of(metrics.MOVES) == {("diffusion", reason): 1}
    assert noted.of(metrics.REPLAYED) == {("diffusion",): 2}
    assert len(noted.observed[metrics.PAUSE, ("diffusion",)]) == 1
    assert len(noted.observed[metrics.QUEUE_TIME, ("diffusion",)]) == 1, "that of its first cell"


async def test_a_run_that_is_handed_over() -> None:
    script = Script(ANSWER, [WELL])
    watching = Watching(script)
    await anext(watching.run)
    script.leaving.add("cell1")
    await watching.run.whole()
    noted = watching.noted
    assert noted.of(metrics.MOVES)[("diffusion", "handed_over")] >= 1
    assert (metrics.PAUSE, ("diffusion",)) not in noted.observed


@pytest.mark.parametrize(
    ("error", "code"), [(NumericalError("NaN"), "ABORTED"), (Overloaded("full"), "RESOURCE_EXHAUSTED")]
)
async def test_a_run_that_an_error_ends(error: NumericalError, code: str) -> None:
    watching = Watching(Script(ANSWER, [Stay(0, error)]), Mode.AR)
    with pytest.raises(type(error)):
        await watching.run.whole()
    noted = watching.noted
    assert noted.of(metrics.FAILURE) == {("ar", code): 1} and not noted.of(metrics.SUCCESS)
    assert not noted.of(metrics.PROMPT_TOKENS) and (metrics.LATENCY, ("ar",)) not in noted.observed


async def test_a_client_that_leaves() -> None:
    watching = Watching(Script(ANSWER, [WELL]))
    await anext(watching.run)
    await watching.run.aclose()
    noted = watching.noted
    assert noted.of(metrics.FAILURE) == {("diffusion", "CANCELLED"): 1}
    assert noted.of(metrics.TOKENS) == {("diffusion",): BLOCK}
    watching.metrics.read()
    assert not watching.noted.added, "nothing of it is kept"


async def test_a_face_that_cancels_the_run_of_a_client_that_has_left() -> None:
    """As gRPC does."""
    watching = Watching(Script(ANSWER, [Stay(1, pace_s=60.0)]))
    reading = asyncio.create_task(watching.run.whole())
    while not watching.metrics._open:
        await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert watching.noted.of(metrics.FAILURE) == {("diffusion", "CANCELLED"): 1}


async def test_causal_modes_have_no_steps_of_diffusion() -> None:
    watching = Watching(Script(ANSWER, [WELL], width=1), Mode.MOCK_AR)
    await watching.run.whole()
    noted = watching.noted
    assert noted.of(metrics.BLOCKS) == {("mock_ar",): len(ANSWER)} and not noted.of(metrics.STEPS)
    assert (metrics.BLOCK_STEPS, ()) not in noted.observed


async def test_rounds_count_what_was_drafted_and_what_was_accepted() -> None:
    watching = Watching(Script(ANSWER, [Stay(2, GONE), WELL]), Mode.VERIFIED)
    usage = (await watching.run.whole()).usage
    noted = watching.noted
    assert usage.num_drafted == len(ANSWER) and usage.num_accepted == len(ANSWER) - usage.num_blocks
    assert noted.of(metrics.BLOCKS) == {("verified",): usage.num_blocks} and not noted.of(metrics.STEPS)
    assert noted.of(metrics.DRAFTS) == {(): usage.num_blocks}
    assert noted.of(metrics.DRAFTED) == {(): usage.num_drafted}
    assert noted.of(metrics.ACCEPTED) == {(): usage.num_accepted}
    assert noted.of(metrics.DRAFT_STEPS) == {(): usage.num_steps}


@pytest.mark.parametrize("chosen", ["ar", "verified", "diffusion"])
async def test_blocks_of_auto_count_by_what_was_chosen(chosen: str) -> None:
    script = Script(ANSWER, [Stay(2, GONE), WELL])
    script.chosen = Mode(chosen)
    watching = Watching(script, Mode.AUTO)
    usage = (await watching.run.whole()).usage
    noted = watching.noted
    assert noted.of(metrics.BLOCKS) == {("auto",): usage.num_blocks} and not noted.of(metrics.STEPS)
    assert {mode: n for (mode,), n in noted.of(metrics.AUTO_BLOCKS).items() if n} == {chosen: usage.num_blocks}


async def test_a_score() -> None:
    tally = Tally()
    request = ScoreRequest(RequestId("s"), (1, 2, 3, 4), 2)
    means = Means(Script((), [WELL]), observers=(RunMetrics(tally),))
    await Scoring(Record(request, FINGERPRINT), Deadline.after(60.0), means).whole()
    noted = Noted(tally)
    assert noted.of(metrics.SUCCESS) == {("score", "stop"): 1} and noted.of(metrics.PROMPT_TOKENS) == {("score",): 4}
    assert not noted.of(metrics.TOKENS) and len(noted.observed[metrics.FIRST_TOKEN, ("score",)]) == 1


async def test_calls_that_are_refused() -> None:
    """What is wrong, what finds no room, what comes too late; an error of a run is none of these."""
    tally = Tally()
    service = generation(ScriptedCells(), observers=(RunMetrics(tally),))
    with pytest.raises(InvalidRequest):
        service.check(Ask("", {}))
    with pytest.raises(Overloaded), ExitStack() as held:
        for _ in range(2000):
            held.enter_context(service.hold())
    with pytest.raises(Overloaded), pytest.MonkeyPatch.context() as patch:
        patch.setattr(service.admission, "fits", lambda *_: True)
        with service.hold():
            raise Overloaded("of a cell")
    service.admission.close()
    with pytest.raises(Unavailable):
        service.check_open()
    assert Noted(tally).of(metrics.REFUSED) == {
        ("INVALID_ARGUMENT",): 1,
        ("RESOURCE_EXHAUSTED",): 1,
        ("UNAVAILABLE",): 1,
    }
