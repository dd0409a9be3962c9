"""A run goes on where its cell dies: the same answer, nothing twice, nothing lost, and not for ever."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.runs.answer import Usage
from cluster.runs.cells import Unfit
from cluster.runs.deadline import Deadline
from cluster.runs.observers import Observer
from cluster.runs.record import Gap, Record
from cluster.runs.run import Generating, Means, Patience, Scoring
from tests.cluster.fakes import BLOCK, FINGERPRINT, VOCABULARY, ByteTokenizer, tokens
from tests.cluster.runs.script import GONE, WELL, Script, Stay
from twotower.core import (
    AnswerEvent,
    BlockEvent,
    DecodingParams,
    FinishReason,
    Floor,
    Likelihood,
    Mode,
    Request,
    RequestId,
    ScoreEvent,
    ScoreRequest,
)
from twotower.errors import DeadlineExceeded, NumericalError, Overloaded, TwoTowerError, Unavailable
from twotower.text.answer_text import AnswerText

TEXT = "Über naïve Öfen 🙂 stop here"
ANSWER = tokens(TEXT)
BLOCKS = -(-len(ANSWER) // BLOCK)
ONCE = Patience(max_resumes=3, queue_timeout_s=60.0)
FULL = Overloaded("full")
USUAL = DecodingParams()


def run_on(
    script: Script,
    stop: Sequence[str] = (),
    patience: Patience = ONCE,
    observers: tuple[Observer, ...] = (),
    timeout_s: float = 60.0,
    params: DecodingParams = USUAL,
) -> Generating:
    record = Record(Request(RequestId("r"), (5, 6), params), FINGERPRINT, "gateway", vocabulary=VOCABULARY)
    means = Means(script, patience, observers)
    return Generating(record, Deadline.after(timeout_s), means, AnswerText(ByteTokenizer(), stop))


async def outcome(run: Generating) -> tuple[list[int], str, Usage, FinishReason | None]:
    """All that a client may see of it, put together from its chunks."""
    token_ids, text = list[int](), ""
    async for chunk in run:
        assert chunk.start == len(token_ids)
        token_ids += chunk.token_ids
        text += chunk.text
    assert (token_ids, text) == (run.token_ids, run.text)
    return token_ids, text, run.usage, run.finish_reason


async def undisturbed(
    stop: Sequence[str] = (), width: int = BLOCK
) -> tuple[list[int], str, Usage, FinishReason | None]:
    return await outcome(run_on(Script(ANSWER, [WELL], width), stop))


@pytest.mark.parametrize("died_after", range(BLOCKS))
@pytest.mark.parametrize("stop", [(), ("stop",), ("Öfen 🙂", "never")])
async def test_an_answer_is_the_same_wherever_its_cell_dies(died_after: int, stop: tuple[str, ...]) -> None:
    """Characters and stop strings lie across the blocks; usage is that of the events that came."""
    script = Script(ANSWER, [Stay(died_after, GONE), WELL])
    run = run_on(script, stop)
    assert await outcome(run) == await undisturbed(stop)
    assert script.committed in ([0], [0, died_after * BLOCK]) and script.open == 0


@pytest.mark.parametrize("died_after", [1, 2, 7, 20])
async def test_a_causal_mode_goes_on_at_any_token(died_after: int) -> None:
    script = Script(ANSWER, [Stay(died_after, GONE), Stay(1, GONE), WELL], width=1)
    assert await outcome(run_on(script, ("stop",))) == await undisturbed(("stop",), width=1)
    assert script.committed == [0, died_after, died_after + 1]


@pytest.mark.parametrize(
    ("chosen", "goes_on_as"),
    [(Mode.AR, Mode.AUTO), (Mode.VERIFIED, Mode.AUTO), (Mode.DIFFUSION, Mode.DIFFUSION)],
)
async def test_auto_goes_on_with_what_its_first_cell_chose(chosen: Mode, goes_on_as: Mode) -> None:
    """So the tokens are those of one mode, wherever they are from."""
    script = Script(ANSWER, [Stay(0, GONE), Stay(2, GONE), WELL])
    script.chosen = chosen
    params = DecodingParams(Mode.AUTO, floor=Floor.CONFIDENCE, confidence_threshold=0.7, seed=3)
    run = await run_on(script, params=params).whole()
    assert run.token_ids == list(ANSWER) and script.committed == [0, 0, 2 * BLOCK]
    asked = [request.params for request, _ in script.placed if isinstance(request, Request)]
    assert asked == [params, params, replace(params, mode=goes_on_as)]
    assert run.request.params == params, "the client is told what it asked for"
    told = {Mode.AR: run.usage.num_ar_blocks, Mode.DIFFUSION: run.usage.num_diffusion_blocks}
    assert told == {Mode.AR: 0, Mode.DIFFUSION: 0} | ({chosen: BLOCKS} if chosen in told else {})


async def test_the_next_cell_knows_it_by_another_name_and_the_one_that_died_is_avoided() -> None:
    script = Script(ANSWER, [Stay(1, GONE, cell="a"), Stay(0, GONE, cell="b"), WELL])
    await outcome(run_on(script))
    assert [request.id for request, _ in script.placed] == ["r", "r~1", "r~2"]
    assert [avoided for _, avoided in script.placed] == [set(), {"a"}, {"a", "b"}]


@pytest.mark.parametrize("max_resumes", [0, 3])
async def test_a_run_is_resumed_so_often_and_then_fails(max_resumes: int) -> None:
    """As it must where it is the request that kills the cells."""
    script = Script(ANSWER, [Stay(0, GONE)])
    with pytest.raises(Unavailable, match="the cell is gone"):
        await outcome(run_on(script, patience=Patience(max_resumes)))
    assert len(script.placed) == 1 + max_resumes and script.open == 0


async def test_an_error_of_the_request_is_not_tried_again() -> None:
    script = Script(ANSWER, [Stay(1, NumericalError("NaN")), WELL])
    with pytest.raises(NumericalError):
        await outcome(run_on(script))
    assert len(script.placed) == 1 and script.open == 0


async def test_one_deadline_for_all_attempts() -> None:
    script, began = Script(ANSWER, [Stay(1, GONE, pace_s=0.02)]), time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"^not finished within 0\.15 s$"):
        await outcome(run_on(script, patience=Patience(100), timeout_s=0.15))
    assert time.monotonic() - began < 2.0 and len(script.placed) > 1 and script.open == 0
    assert script.timeouts == sorted(script.timeouts, reverse=True), "each cell is told what is left"


async def test_what_a_cell_says_twice_counts_once() -> None:
    script = Script(ANSWER, [Stay(starts=(0, 0, 4, 4, 0, 8, 12, 16, 20, 24, 28, 32))])
    assert await outcome(run_on(script)) == await undisturbed()
    assert len(script.placed) == 1


async def test_a_cell_that_begins_at_the_start_again_adds_nothing_to_what_is_there() -> None:
    """As one that knows nothing of committed tokens; nor does it matter where its events are joined."""
    script = Script(ANSWER, [Stay(2, GONE), Stay(starts=(0, 3, 7, 11, 15, 19, 23, 27, 31)), WELL])
    token_ids, text, usage, _ = await outcome(run_on(script))
    assert (token_ids, text) == (list(ANSWER), TEXT) and usage.completion_tokens == len(ANSWER)


def test_what_a_cell_repeats_must_be_what_was_said() -> None:
    record = Record(Request(RequestId("r"), (5,)), FINGERPRINT, committed=[1, 2, 3])
    for start, token_ids in ((0, (1, 9)), (2, (9, 4)), (2, (9,))):
        with pytest.raises(Gap, match="that are not those of before"):
            record.news(BlockEvent(RequestId("r"), start, token_ids, 1, 1))
    assert record.news(BlockEvent(RequestId("r"), 1, (2, 3), 2, 2)) is None
    joined = BlockEvent(RequestId("r"), 1, (2, 3, 4, 5), 8, 4, FinishReason.LENGTH)
    assert record.news(joined) == BlockEvent(RequestId("r"), 3, (4, 5), 4, 2, FinishReason.LENGTH)
    assert record.committed == [1, 2, 3, 4, 5]


def test_what_asks_for_likelihoods_is_not_told_without() -> None:
    """As by a cell of an older version, which does not know the field."""
    asking = Record(Request(RequestId("r"), (5,), logprobs=0), FINGERPRINT)
    with pytest.raises(Gap, match="got 2 tokens with 0 likelihoods, wanted one for each"):
        asking.news(BlockEvent(RequestId("r"), 0, (2, 3), 1, 1))
    rated = (Likelihood(-1.0), Likelihood(-2.0))
    assert asking.news(BlockEvent(RequestId("r"), 0, (2, 3), 1, 1, likelihoods=rated)) is not None
    scores = Record(ScoreRequest(RequestId("s"), (5, 6, 7), 1, logprobs=3), FINGERPRINT)
    with pytest.raises(Gap):
        scores.check_rated(ScoreEvent(RequestId("s"), (-1.0, -2.0), (True, True), 1.0))
    scores.check_rated(ScoreEvent(RequestId("s"), (-1.0, -2.0), (True, True), 1.0, rated))


@pytest.mark.parametrize("starts", [(4,), (0, 8)])
async def test_a_gap_ends_the_attempt_and_is_logged(starts: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    script = Script(ANSWER, [Stay(starts=starts), WELL])
    assert await outcome(run_on(script)) == await undisturbed()
    assert script.committed == [0, (len(starts) - 1) * BLOCK]
    [record] = caplog.records
    assert record.levelname == "ERROR" and "wanted those from" in record.getMessage()


async def test_a_full_cell_is_left_for_one_that_is_not() -> None:
    stays = [Stay(0, FULL, cell="a"), Stay(0, FULL, cell="b"), WELL]
    script = Script(ANSWER, stays, living=["a", "b", "c"])
    assert await outcome(run_on(script)) == await undisturbed()
    assert [avoided for _, avoided in script.placed] == [set(), {"a"}, {"a", "b"}]


@pytest.mark.parametrize(("living", "asked"), [(["a"], 1), (["a", "b"], 2), (list("abcdefgh"), 4)])
async def test_where_all_are_full_the_client_hears_so(living: list[str], asked: int) -> None:
    script = Script(ANSWER, [Stay(0, FULL, cell=cell) for cell in living], living=living)
    with pytest.raises(Overloaded, match="full"):
        await outcome(run_on(script))
    assert len(script.placed) == asked and script.open == 0


async def test_a_run_waits_for_a_cell() -> None:
    mending = Stay(refuses=Unavailable("this cell is mending"))
    script = Script(ANSWER, [mending, mending, Stay(1, GONE), mending, WELL])
    assert await outcome(run_on(script, patience=Patience(1))) == await undisturbed(), "waiting is no resume"
    with pytest.raises(Unavailable, match=r"^no cell took this request within 0\.1 s: this cell is mending$"):
        await outcome(run_on(Script(ANSWER, [mending]), patience=Patience(3, 0.1)))


@pytest.mark.parametrize(("living", "avoided"), [(["a"], set()), (["a", "b"], {"a"})])
async def test_where_all_have_refused_they_are_asked_again(living: list[str], avoided: set[str]) -> None:
    """Not those that are unfit, which may have nothing to do and so be Serve's first choice."""
    mending = Stay(refuses=Unavailable("this cell is mending"))
    script = Script(ANSWER, [Stay(1, GONE, cell="a"), mending, WELL], living=living)
    assert await outcome(run_on(script)) == await undisturbed()
    assert [avoid for _, avoid in script.placed] == [set(), {"a"}, avoided]


async def test_a_cell_that_never_can_is_avoided_for_one_that_may() -> None:
    script = Script(ANSWER, [Stay(refuses=Unfit("old", "does not know min_p")), WELL], living=["old", "new"])
    assert await outcome(run_on(script)) == await undisturbed()
    assert [avoided for _, avoided in script.placed] == [set(), {"old"}]


async def test_a_cell_that_does_not_answer_is_no_cell() -> None:
    class Hanging(Script):
        async def place(self, *args: object) -> None:  # type: ignore[override]
            await asyncio.Event().wait()

    with pytest.raises(Unavailable, match=r"^no cell took this request within 0\.1 s$"):
        await outcome(run_on(Hanging(ANSWER, []), patience=Patience(3, 0.1)))
    with pytest.raises(DeadlineExceeded):
        await outcome(run_on(Hanging(ANSWER, []), timeout_s=0.1))
    run = run_on(Hanging(ANSWER, []))
    placing = asyncio.ensure_future(anext(run))
    await asyncio.sleep(0.01)
    placing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await placing
    run = run_on(Hanging(ANSWER, []))
    placing = asyncio.ensure_future(anext(run))
    await asyncio.sleep(0.01)
    run.give_up(Unavailable("closing"))
    with pytest.raises(Unavailable, match="closing"):
        await placing


async def test_a_run_stays_with_its_checkpoint() -> None:
    other = Stay(cell="new", fingerprint="another")
    script = Script(ANSWER, [Stay(2, GONE, cell="old"), other, WELL], living=["old", "new", "older"])
    assert await outcome(run_on(script)) == await undisturbed()
    assert script.committed == [0, 8, 8] and script.open == 0
    script = Script(ANSWER, [Stay(2, GONE, cell="old"), other], living=["new"])
    with pytest.raises(Unavailable, match=f"got a cell with checkpoint another, wanted {FINGERPRINT}"):
        await outcome(run_on(script))
    assert script.open == 0


async def test_a_run_without_tokens_begins_on_other_weights_and_stays_with_them() -> None:
    """While weights change there may be no cell with the router's own."""
    other = Stay(cell="new", fingerprint="another")
    script = Script(ANSWER, [other], living=["new"])
    assert await outcome(run_on(script)) == await undisturbed()
    back = replace(WELL, cell="old")
    script = Script(ANSWER, [replace(other, events=2, error=GONE), back, other], living=["new", "old", "newer"])
    assert await outcome(run_on(script)) == await undisturbed()
    assert script.committed == [0, 8, 8] and script.open == 0, "the second cell has the router's weights, not the run's"
    script = Script(ANSWER, [replace(other, events=0, error=GONE), back], living=["new", "old"])
    assert await outcome(run_on(script)) == await undisturbed()
    assert len(script.placed) == 2, "it had no token yet"


@pytest.mark.parametrize("vocabulary", ["another", ""])
async def test_no_run_begins_where_token_ids_mean_something_else(vocabulary: str) -> None:
    script = Script(ANSWER, [Stay(fingerprint="another", vocabulary=vocabulary)], living=["new"])
    with pytest.raises(Unavailable, match=f"got a cell with checkpoint another, wanted {FINGERPRINT}"):
        await outcome(run_on(script))
    assert script.open == 0


@pytest.mark.parametrize("stays", [[WELL], [Stay(0, GONE), WELL], [Stay(refuses=GONE), Stay(0, GONE), WELL]])
async def test_scores_are_asked_for_again_as_a_whole(stays: list[Stay]) -> None:
    script, asked = Script((), stays), ScoreRequest(RequestId("s"), (1, 2, 3, 4), 2)
    scores = await Scoring(Record(asked, FINGERPRINT), Deadline.after(60), Means(script)).whole()
    assert scores.log_probs == (-0.5, -0.5) and script.open == 0
    assert {(r.token_ids, r.start) for r, _ in script.placed if isinstance(r, ScoreRequest)} == {((1, 2, 3, 4), 2)}


async def test_each_asking_has_a_name_of_its_own() -> None:
    """A cell that was too slow to take it has it yet, and would take the next for a repetition."""
    slow = Stay(refuses=Unavailable("no cell took this request within 3 s"), cell="a")
    script = Script(ANSWER, [slow, slow, Stay(1, GONE, cell="a"), slow, Stay(cell="a")])
    assert await outcome(run_on(script)) == await undisturbed()
    names = [request.id for request, _ in script.placed]
    assert names[0] == "r" and len(set(names)) == len(names) == 5


async def test_what_is_given_up_in_the_moment_of_its_deadline_is_over_all_the_same() -> None:
    loop, failed = asyncio.get_running_loop(), list[Exception]()
    run = run_on(Script(ANSWER, [Stay(pace_s=60.0)]))
    waiting = asyncio.ensure_future(anext(run))
    while run._timer is None or not run._attempt:
        await asyncio.sleep(0)
    run._timer.reschedule(loop.time())

    def give_up() -> None:
        try:
            run.give_up(Unavailable("closing"))
        except Exception as error:
            failed.append(error)

    loop.call_later(0.0001, give_up)
    time.sleep(0.001)  # both are due
    with pytest.raises((Unavailable, DeadlineExceeded)):
        await waiting
    await asyncio.sleep(0.001)
    assert not failed, "others are to be given up after it"


async def test_whoever_leaves_ends_the_attempt() -> None:
    script = Script(ANSWER, [WELL])
    run = run_on(script)
    await anext(run)
    assert script.open == 1
    await run.aclose()
    assert script.open == 0
    await run.aclose()


class Notes(Observer):
    """What it hears, in a word each."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def opened(self, record: Record) -> None:
        self.heard.append("opened")

    def placed(self, record: Record) -> None:
        self.heard.append(f"on {record.attempts[-1]}")

    def first_event(self, record: Record, event: AnswerEvent) -> None:
        self.heard.append("first")

    def event(self, record: Record, event: AnswerEvent) -> None:
        self.heard.append(str(len(record.committed)))

    def resumed(self, record: Record, error: TwoTowerError) -> None:
        self.heard.append("resumed")

    def ended(self, record: Record, error: BaseException | None) -> None:
        self.heard.append(type(error).__name__)


async def test_observers_hear_it_all() -> None:
    notes = Notes()
    script = Script(ANSWER[:10], [Stay(1, GONE, cell="a"), Stay(cell="b")])
    await outcome(run_on(script, observers=(notes,)))
    assert notes.heard == ["opened", "on a", "first", "4", "resumed", "on b", "8", "10", "NoneType"]
    notes = Notes()
    run = run_on(Script(ANSWER, [WELL]), observers=(notes,))
    await anext(run)
    await run.aclose()
    assert notes.heard[-1] == "Cancelled"
    notes = Notes()
    with pytest.raises(NumericalError):
        await outcome(run_on(Script(ANSWER, [Stay(0, NumericalError("NaN"), cell="a")]), observers=(notes,)))
    assert notes.heard == ["opened", "on a", "NumericalError"]


class Leaving(Observer):
    """After so many events the first cell is one that is to go."""

    def __init__(self, script: Script, after: int) -> None:
        self._script, self._left = script, after

    def event(self, record: Record, event: AnswerEvent) -> None:
        self._left -= 1
        if self._left == 0:
            self._script.leaving.add(record.attempts[0])


@pytest.mark.parametrize("after", range(1, BLOCKS))
async def test_a_run_moves_from_a_cell_that_is_to_go_at_its_next_block(after: int) -> None:
    script = Script(ANSWER, [WELL])
    run = run_on(script, ("stop",), Patience(max_resumes=0), observers=(Leaving(script, after),))
    assert await outcome(run) == await undisturbed(("stop",))
    moved = script.committed[1:]
    assert moved == ([after * BLOCK] if moved else []) and script.open == 0
    assert moved or run.finish_reason is FinishReason.STOP, "the stop string came first"
    assert all(cell in avoided for _, avoided in script.placed[1:] for cell in ("cell1",))


@pytest.mark.parametrize(("pause_s", "asked"), [(0.0, BLOCKS - 2), (3600.0, 1)])
@pytest.mark.parametrize(
    "next_stay",
    [
        Stay(refuses=FULL),
        Stay(refuses=GONE),
        Stay(refuses=TwoTowerError("the cell failed")),
        Stay(fingerprint="another"),
        Stay(cell="cell1"),
    ],
)
async def test_a_run_stays_where_no_other_cell_takes_it(
    next_stay: Stay, pause_s: float, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks again at a later block, after a pause."""
    monkeypatch.setattr("cluster.runs.run._LONGEST_PAUSE_S", pause_s)
    script = Script(ANSWER, [WELL, next_stay])
    assert await outcome(run_on(script, observers=(Leaving(script, 2),))) == await undisturbed()
    assert len(script.placed) == 1 + asked
    assert script.open == 0


async def test_what_has_begun_waits_for_room_and_what_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.runs.run._LONGEST_PAUSE_S", 0.01)
    script = Script(ANSWER, [Stay(2, GONE), Stay(0, FULL), Stay(0, FULL), WELL])
    assert await outcome(run_on(script)) == await undisturbed()
    script = Script(ANSWER, [Stay(2, GONE), Stay(0, FULL)])
    with pytest.raises(Unavailable, match=r"no cell had room to go on with this request within 0\.05 s"):
        await outcome(run_on(script, patience=Patience(queue_timeout_s=0.05)))
    with pytest.raises(Overloaded):
        await outcome(run_on(Script(ANSWER, [Stay(0, FULL)])))
