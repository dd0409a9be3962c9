"""The service's one path from what a client asked to what it gets. HTTP and gRPC are thin faces of this.

Knows validation and opens runs; does not know the wire on one side, nor Ray on the other.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar
from weakref import WeakSet

from cluster.admission import Admission
from cluster.deadline import Deadline
from cluster.lanes import Lanes
from cluster.runs.answer import Chunk
from cluster.runs.cells import Cells
from cluster.runs.observers import LogLines
from cluster.runs.record import Record
from cluster.runs.run import Generating, Means, Patience, Run, Scoring
from cluster.served_model import ServedModel
from cluster.streams import merged
from twotower.decoding.text import AnswerText
from twotower.decoding.tokenizer import check_stop, require_tokenizer
from twotower.errors import InvalidRequest, TwoTowerError
from twotower.validation import (
    check_bytes,
    check_priority,
    make_request,
    make_score_request,
    parse_params,
    show,
)

AnyRun = TypeVar("AnyRun", bound=Run)
_TOKENIZED_S = 1e-6  # a byte, about
_LABEL = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client sent, unchecked. `params` holds only what was given, under the names of DecodingParams.

    `label` is the client's name for it, echoed and logged; several requests may bear the same. `id` is ours.
    """

    prompt: str | Sequence[object]
    params: Mapping[str, object] = field(default_factory=dict)
    stop: object = ()
    label: str = ""
    priority: object = 0
    id: str = field(default_factory=lambda: drawn_id())


@dataclass(frozen=True, slots=True)
class ScoreAsk:
    """What a client wants scored, unchecked: the continuation, after the prompt. Each is text or token ids.

    `label` as an Ask's.
    """

    prompt: str | Sequence[object]
    continuation: str | Sequence[object]
    label: str = ""
    priority: object = 0


class Generation:
    """Checks requests and has cells decode or score them. `at_once`: prompts of one call that they hold at a time.

    Faces take a place of the `admission` for as long as they are busy with a call.
    """

    def __init__(
        self,
        model: ServedModel,
        cells: Cells,
        default_timeout_s: float = 600.0,
        at_once: int = 16,
        admission: Admission | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.model, self.default_timeout_s, self._at_once = model, default_timeout_s, at_once
        self._means = Means(cells, patience or Patience(), (LogLines(),))
        self._runs: WeakSet[Run] = WeakSet()
        self._given_up: TwoTowerError | None = None
        self.lanes = Lanes()
        self.admission = admission or Admission(capacity=1024, slots=at_once)

    def place(self, asks: Sequence[Ask]) -> AbstractContextManager[None]:
        """A place for a call of these asks, which differ in their prompts: one for each that the cells hold of it at a
        time. What is wrong with it is said also where there is none. Raises InvalidRequest, Overloaded, Unavailable.
        """
        places = min(len(asks), self._at_once)
        if not self.admission.fits(places):
            self.check(asks[0])
        return self.admission.place(places)

    def check(self, ask: Ask) -> None:
        """All but the prompt. Raises InvalidRequest."""
        _check_label(ask.label)
        check_stop(self.model.tokenizer, ask.stop)
        parse_params(ask.params, self.model.limits)
        check_priority(ask.priority)

    def deadline(self, timeout_s: float | None = None) -> Deadline:
        """For a request that comes in now; `timeout_s`: how long its client waits, where the client says."""
        return Deadline.after(self.default_timeout_s if timeout_s is None else timeout_s)

    async def run(self, ask: Ask, deadline: Deadline) -> Generating:
        """The run of a checked request. Raises InvalidRequest for everything wrong with `ask`, before any cell is
        asked; DeadlineExceeded.
        """
        if isinstance(ask.prompt, str):
            self.check(ask)  # before the text is tokenized, which may take long
        _check_label(ask.label)
        stop = check_stop(self.model.tokenizer, ask.stop)
        prompt = await self._token_ids("prompt", ask.prompt, deadline)
        request = make_request(ask.id, prompt, ask.params, self.model.limits, ask.priority)
        record, text = Record(request, self.model.fingerprint, ask.label), AnswerText(self.model.tokenizer, stop)
        return self._added(Generating(record, deadline, self._means, text))

    async def score_run(self, ask: ScoreAsk, deadline: Deadline) -> Scoring:
        """As `run`."""
        _check_label(ask.label)
        prompt = await self._token_ids("prompt", ask.prompt, deadline)
        continuation = await self._token_ids("continuation", ask.continuation, deadline)
        request = make_score_request(drawn_id(), prompt, continuation, self.model.limits, ask.priority)
        return self._added(Scoring(Record(request, self.model.fingerprint, ask.label), deadline, self._means))

    def many(self, runs: Sequence[Generating]) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Chunks of all runs of a call as they come, each with its run's number.

        The rest waits here, so that a call of many prompts needs no more room in the cells' queues than others do.
        """
        return merged(runs, at_once=self._at_once)

    def give_up(self, error: TwoTowerError) -> None:
        """Whatever still runs ends with this error, on its cell too, and so does what begins from now on."""
        self._given_up = error
        for run in self._runs:
            run.give_up(error)

    def _added(self, run: AnyRun) -> AnyRun:
        self._runs.add(run)
        if self._given_up is not None:
            run.give_up(self._given_up)
        return run

    async def _token_ids(self, name: str, given: str | Sequence[object], deadline: Deadline) -> Sequence[object]:
        """Token ids of the prompt, or of the continuation of one. Text that cannot fit is not tokenized."""
        if not isinstance(given, str):
            await asyncio.sleep(0)  # many prompts of a call, one after the other, hold the loop up
            return given
        tokenizer = require_tokenizer(self.model.tokenizer, name)
        text = check_bytes(name, given, self.model.limits.max_sequence_length, tokenizer.bytes_per_token)
        if not text:
            return ()
        encode = tokenizer.encode if name == "prompt" else tokenizer.encode_continuation
        return await self.lanes.run(len(text.encode()) * _TOKENIZED_S, partial(encode, text), deadline)


def drawn_id() -> str:
    """An id that no other request has, of this router or of another."""
    return f"req-{uuid.uuid4().hex}"


def _check_label(label: str) -> None:
    if label and not _LABEL.fullmatch(label):
        raise InvalidRequest.of(
            "request_id", f"got {show(label)}, wanted 1 to 128 printable ASCII characters without spaces"
        )
