"""The service's only path from a client's request to its answer. HTTP and gRPC are thin faces of it.

Knows validation and opens runs; does not know the wire on one side, nor Ray on the other.
"""

import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar
from weakref import WeakSet

from cluster.runs.admission import Admission
from cluster.runs.allowances import Allowances, Wish
from cluster.runs.answer import Piece
from cluster.runs.callers import NOBODY, Caller, Door, OpenDoor
from cluster.runs.cells import Cells
from cluster.runs.choices import tries_of
from cluster.runs.deadline import Deadline
from cluster.runs.echoing import EchoedPrompt, Echoing
from cluster.runs.labels import WANTED, is_label
from cluster.runs.lanes import Lanes
from cluster.runs.observers import Observer
from cluster.runs.prompts import NO_PART, Given, Part, Prompts, length_of
from cluster.runs.record import Record
from cluster.runs.run import Generating, Means, Patience, Run, Scoring
from cluster.runs.served_model import ServedModel
from cluster.runs.streams import Stream, merged
from cluster.runs.trace_parent import NO_PARENT, TraceParent
from cluster.runs.turns import Turns
from twotower.constraints import Constraint
from twotower.core import Request, ScoreEvent, ScoreRequest
from twotower.errors import InvalidRequest, TwoTowerError
from twotower.showing import show
from twotower.text.answer_text import AnswerText
from twotower.text.grammars import FIELD
from twotower.text.token_names import TokenNames, TokenNumbers
from twotower.text.token_texts import TokenTexts
from twotower.text.tokenizer import check_stop
from twotower.validation import (
    Problems,
    Terms,
    check_likelihoods,
    check_priority,
    check_terms,
    join,
    join_score,
)

AnyRun = TypeVar("AnyRun", bound=Run)
_COMPILED_S = 0.1  # seconds for a grammar: some take a millisecond, some a second
_DETOKENIZED_S = 5e-5  # a token, one by one


@dataclass(frozen=True, slots=True)
class Ask:
    """A client's request, unchecked. `params` holds only given values, under the names of DecodingParams.

    `label` is the client's name for it, echoed and logged; several requests may share it. `id` is ours. `trace`:
    whether the stream shows the steps. `logprobs`: the number of alternatives in likelihoods; None: no likelihoods.
    `special_tokens`: whether the tokenizer adds special tokens, such as a BOS. `offsets`: whether likelihoods include
    where each token's text begins, which takes the tokenizer a while. `with_stop`: the text includes the stop string.
    """

    prompt: Given
    params: Mapping[str, object] = field(default_factory=dict)
    stop: object = ()
    label: str = ""
    priority: object = 0
    id: str = field(default_factory=lambda: drawn_id())
    trace: object = False
    logprobs: object = None
    special_tokens: bool = True
    offsets: bool = True
    with_stop: bool = False


@dataclass(frozen=True, slots=True)
class ScoreAsk:
    """A client's score request, unchecked: the continuation, after the prompt. `label` and `id` as in an Ask."""

    prompt: Given
    continuation: Given
    label: str = ""
    priority: object = 0
    id: str = field(default_factory=lambda: drawn_id())


@dataclass(frozen=True, slots=True)
class Checked:
    """A checked Ask; only its text may still have too many tokens.

    `request` is None if the prompt is text, which has not been tokenized yet.
    """

    ask: Ask
    stop: tuple[str, ...]
    prompt: Part
    terms: Terms
    request: Request | None


@dataclass(frozen=True, slots=True)
class CheckedScore:
    """As Checked: `request` is None if prompt or continuation is text."""

    ask: ScoreAsk
    prompt: Part
    continuation: Part
    priority: int
    request: ScoreRequest | None


class Generation:
    """Checks requests and lets cells decode or score them. `at_once`: prompts of one call that the cells hold at a
    time.

    Faces check a call first, under any load. Then they hold room in the `admission` while they work on it.
    """

    def __init__(
        self,
        model: ServedModel,
        cells: Cells,
        default_timeout_s: float = 600.0,
        at_once: int = 16,
        admission: Admission | None = None,
        patience: Patience | None = None,
        turns: Turns | None = None,
        observers: Sequence[Observer] = (),
        door: Door | None = None,
    ) -> None:
        self.model, self.default_timeout_s, self._at_once = model, default_timeout_s, at_once
        self._door, self._allowances = door or OpenDoor(), Allowances()
        observers = (*observers, self._allowances)
        self._means = Means(cells, patience or Patience(), observers, turns or Turns())
        self._runs: WeakSet[Run] = WeakSet()
        self._given_up: TwoTowerError | None = None
        self.lanes = Lanes()
        self.prompts = Prompts(model, self.lanes)
        self.token_texts = TokenTexts(model.tokenizer)
        self.token_names, self.token_numbers = TokenNames(self.token_texts), TokenNumbers(self.token_texts)
        self.admission = admission or Admission(capacity=1024, slots=at_once)

    def check(self, ask: Ask) -> Checked:
        """Raises InvalidRequest for all errors, except for the number of its text's tokens."""
        with self._refusals_told():
            return self._check(ask)

    def _check(self, ask: Ask) -> Checked:
        problems, limits = Problems(), self.model.limits
        _check_label(ask.label, problems)
        stop = problems.of(lambda: check_stop(self.model.tokenizer, ask.stop), tuple[str, ...]())
        prompt = problems.of(lambda: self.prompts.checked("prompt", ask.prompt), NO_PART)
        terms = problems.of(lambda: check_terms(ask.params, ask.priority, limits, ask.trace, ask.logprobs), None)
        problems.raise_any()
        assert terms is not None
        request = join(ask.id, prompt, terms, limits) if isinstance(prompt, tuple) else None
        return Checked(ask, stop, prompt, terms, request)

    def check_score(self, ask: ScoreAsk, prompt: Part | None = None) -> CheckedScore:
        """As `check`. `prompt`: the ask's checked prompt, if it was checked with another continuation."""
        with self._refusals_told():
            return self._check_score(ask, prompt)

    def _check_score(self, ask: ScoreAsk, prompt: Part | None) -> CheckedScore:
        problems = Problems()
        _check_label(ask.label, problems)
        if prompt is None:
            prompt = problems.of(lambda: self.prompts.checked("prompt", ask.prompt), NO_PART)
        continuation = problems.of(lambda: self.prompts.checked("continuation", ask.continuation), NO_PART)
        priority = problems.of(lambda: check_priority(ask.priority), 0)
        problems.raise_any()
        request = None
        if isinstance(prompt, tuple) and isinstance(continuation, tuple):
            request = join_score(ask.id, prompt, continuation, priority, self.model.limits)
        return CheckedScore(ask, prompt, continuation, priority, request)

    def caller(self, key: str | None, address: str) -> Caller:
        """The caller of a call with this key, or without one. Raises KeyRefused."""
        with self._refusals_told():
            return self._door.caller(key, address)

    def check_open(self) -> None:
        """Raises Unavailable once no more requests are accepted."""
        with self._refusals_told():
            self.admission.check_open()

    @contextmanager
    def hold(self, checked: "Sequence[Checked | CheckedScore]" = (), caller: Caller = NOBODY) -> Iterator[None]:
        """Hold room for a call of these prompts: for as many as the cells hold of it at a time.

        Raises Unavailable, InvalidRequest for a call that its key can never allow, Overloaded and LimitReached.
        """
        requests = min(max(1, len(checked)), self._at_once)
        wish = Wish(requests, sum(map(_most_tokens, checked)))
        with ExitStack() as held:
            with self._refusals_told():
                self.admission.check_open()
                _check_likelihoods(checked)
                for one in checked:
                    self._allowances.check_priority(_priority(one), caller)
                held.enter_context(self._allowances.hold(wish, caller))
                held.enter_context(self.admission.hold(requests, caller))
            yield

    def deadline(self, timeout_s: float | None = None) -> Deadline:
        """The deadline of a request that arrives now; `timeout_s`: the client's own limit, if any."""
        return Deadline.after(self.default_timeout_s if timeout_s is None else timeout_s)

    async def run(
        self, checked: Checked, deadline: Deadline, caller: Caller = NOBODY, parent: TraceParent = NO_PARENT
    ) -> Generating:
        """The request's run, not placed on a cell yet. Raises InvalidRequest if its text has too many tokens or its
        grammar cannot be compiled, and DeadlineExceeded.
        """
        return (await self.runs(checked, 1, deadline, caller, parent))[0]

    async def runs(
        self,
        checked: Checked,
        count: int,
        deadline: Deadline,
        caller: Caller = NOBODY,
        parent: TraceParent = NO_PARENT,
    ) -> list[Generating]:
        """As `run`, for so many answers to one prompt, which is tokenized once."""
        ask, request, model = checked.ask, checked.request, self.model
        if request is None:
            with self._refusals_told():
                prompt = await self.prompts.token_ids("prompt", checked.prompt, deadline, ask.special_tokens)
                request = join(ask.id, prompt, checked.terms, self.model.limits)
        await self._compiled(request.params.structured_outputs, deadline)
        runs = []
        for one in tries_of(replace(request, cache_salt=_salt(caller)), count):
            record = Record(one, model.fingerprint, ask.label, caller, parent=parent, vocabulary=model.vocabulary)
            with_offsets = ask.offsets and one.logprobs is not None
            text = AnswerText(model.tokenizer, checked.stop, with_offsets, ask.with_stop, one.params.min_tokens)
            runs.append(self._added(Generating(record, deadline, self._means, text)))
        return runs

    async def _compiled(self, constraint: Constraint | None, deadline: Deadline) -> None:
        """Compiles the grammar only as a check; a tower compiles its own. Raises InvalidRequest, DeadlineExceeded."""
        grammars = self.model.grammars
        if constraint is None or (grammars is not None and constraint in grammars):
            return
        with self._refusals_told():
            if grammars is None:
                raise InvalidRequest.of(FIELD, "not served here: there is no tokenizer")
            await self.lanes.run(_COMPILED_S, partial(grammars.matcher, constraint), deadline)

    async def echo_run(
        self,
        checked: Checked,
        answers: bool,
        deadline: Deadline,
        caller: Caller = NOBODY,
        parent: TraceParent = NO_PARENT,
    ) -> Echoing:
        """As `run`, with the prompt echoed; without an answer unless it `answers`."""
        answer = await self.run(checked, deadline, caller, parent)
        request, model = answer.request, self.model
        prompt, scoring = request.prompt_token_ids, None
        if request.logprobs is not None and len(prompt) > 1:
            score_id, priority = f"{request.id}-prompt", request.priority
            scored = join_score(score_id, prompt[:1], prompt[1:], priority, model.limits, request.logprobs)
            scored = replace(scored, cache_salt=_salt(caller))
            label, vocabulary = checked.ask.label, model.vocabulary
            record = Record(scored, model.fingerprint, label, caller, parent=parent, vocabulary=vocabulary)
            scoring = self._added(Scoring(record, deadline, self._means))
        text = AnswerText(model.tokenizer, with_offsets=True)
        await self.lanes.run(len(prompt) * _DETOKENIZED_S, partial(text.push, prompt, last=True), deadline)
        given = checked.prompt if isinstance(checked.prompt, str) else text.text or ""
        return Echoing(EchoedPrompt(prompt, given, text.offsets), scoring, answer, answers)

    async def score_run(
        self, checked: CheckedScore, deadline: Deadline, caller: Caller = NOBODY, parent: TraceParent = NO_PARENT
    ) -> Scoring:
        """As `run`."""
        ask, request, model = checked.ask, checked.request, self.model
        if request is None:
            with self._refusals_told():
                prompt = await self.prompts.token_ids("prompt", checked.prompt, deadline)
                continuation = await self.prompts.token_ids(
                    "continuation", checked.continuation, deadline, special=False
                )
                request = join_score(ask.id, prompt, continuation, checked.priority, self.model.limits)
        request = replace(request, cache_salt=_salt(caller))
        record = Record(request, model.fingerprint, ask.label, caller, parent=parent, vocabulary=model.vocabulary)
        return self._added(Scoring(record, deadline, self._means))

    def many(self, runs: Sequence[Stream[Piece]]) -> AsyncGenerator[tuple[int, Piece], None]:
        """Pieces of all runs of a call as they come, each with its run's number.

        The rest waits here, so that a call of many prompts needs no more room in the cells' queues than other calls.
        """
        return merged(runs, at_once=self._at_once)

    async def scores(self, wholes: Sequence[Callable[[], Awaitable[ScoreEvent]]]) -> list[ScoreEvent]:
        """The scores of all runs of a call, in order. As in `many`, the rest waits here."""
        told = dict[int, ScoreEvent]()
        async with aclosing(merged([_alone(whole) for whole in wholes], at_once=self._at_once)) as scored:
            async for place, event in scored:
                told[place] = event
        return [told[place] for place in range(len(wholes))]

    def give_up(self, error: TwoTowerError) -> None:
        """End all running requests with this error, on their cells too, and all requests that begin from now on."""
        self._given_up = error
        for run in self._runs:
            run.give_up(error)

    @contextmanager
    def _refusals_told(self) -> Iterator[None]:
        try:
            yield
        except TwoTowerError as error:
            for observer in self._means.observers:
                observer.refused(error)
            raise

    def _added(self, run: AnyRun) -> AnyRun:
        self._runs.add(run)
        if self._given_up is not None:
            run.give_up(self._given_up)
        return run


async def _alone(whole: Callable[[], Awaitable[ScoreEvent]]) -> AsyncGenerator[ScoreEvent, None]:
    yield await whole()


def _check_likelihoods(checked: "Sequence[Checked | CheckedScore]") -> None:
    """Check the log-probabilities of all prompts of a call together. Raises InvalidRequest."""
    asking = [one.terms for one in checked if isinstance(one, Checked) and one.terms.logprobs is not None]
    if asking:
        check_likelihoods(sum(terms.params.max_new_tokens for terms in asking), asking[0].logprobs)


def _salt(caller: Caller) -> str:
    """Keys share no prefixes, because the time to an answer's begin would reveal another key's prompts. Without keys
    all callers share.
    """
    return caller.key or ""


def _priority(checked: Checked | CheckedScore) -> int:
    return checked.priority if isinstance(checked, CheckedScore) else checked.terms.priority


def _most_tokens(checked: Checked | CheckedScore) -> int:
    """The most tokens that a request may take; for text an estimate."""
    if isinstance(checked, CheckedScore):
        return length_of(checked.prompt) + length_of(checked.continuation)
    return length_of(checked.prompt) + checked.terms.params.max_new_tokens


def drawn_id() -> str:
    """An id that is unique over all routers."""
    return f"req-{uuid.uuid4().hex}"


def _check_label(label: str, problems: Problems) -> None:
    if label and not is_label(label):
        problems.say("request_id", f"got {show(label)}, wanted {WANTED}")
