"""The continuations of one prompt in a call: each is a separate request, under the client's name."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from cluster.runs.callers import Caller
from cluster.runs.deadline import Deadline
from cluster.runs.generation import CheckedScore, Generation, ScoreAsk
from cluster.runs.prompts import Given
from cluster.runs.run import Scoring
from cluster.runs.trace_parent import TraceParent
from twotower.core import ScoreEvent
from twotower.errors import FieldError, InvalidRequest

FIRST = "continuation"  # the library's name of a continuation; both faces rename its errors themselves
MAX_TOKENS = 2**20  # tokens of several continuations, each with its prompt: every one is read, held and returned


class Continuations:
    """Unchecked continuations. `named`: at least one, each with the client's name for it. `ids`: the suffix of a name
    for the list of ids in it. The first has the call's own id.
    """

    def __init__(
        self,
        prompt: Given,
        named: Sequence[tuple[str, Given]],
        label: str,
        priority: object,
        own_id: str,
        ids: str = "",
    ) -> None:
        self._names, self._ids = [name for name, _ in named], ids
        own_ids = (own_id, *(f"{own_id}-{place}" for place in range(1, len(named))))
        self._asks = [
            ScoreAsk(prompt, part, label, priority, each) for each, (_, part) in zip(own_ids, named, strict=True)
        ]

    def checked(self, generation: Generation) -> list[CheckedScore]:
        """Raises InvalidRequest for the first wrong one."""
        checked, tokens = list[CheckedScore](), 0
        for name, ask in zip(self._names, self._asks, strict=True):
            with self._told_under(name):
                checked.append(generation.check_score(ask, checked[0].prompt if checked else None))
                request = checked[-1].request
                tokens = self._counted(tokens, 0 if request is None else len(request.token_ids))
        return checked

    async def runs(
        self,
        generation: Generation,
        checked: Sequence[CheckedScore],
        deadline: Deadline,
        caller: Caller,
        parent: TraceParent,
    ) -> list[Scoring]:
        """Runs that have not been placed on a cell yet. The prompt is tokenized once. Raises InvalidRequest if a text
        has too many tokens, and DeadlineExceeded.
        """
        runs, tokens = list[Scoring](), 0
        for name, one in zip(self._names, checked, strict=True):
            with self._told_under(name):
                known = replace(one, prompt=_prompt_of(runs[0])) if runs and one.request is None else one
                runs.append(await generation.score_run(known, deadline, caller, parent))
                tokens = self._counted(tokens, len(runs[-1].request.token_ids))
        return runs

    async def scores(self, generation: Generation, runs: Sequence[Scoring]) -> list[ScoreEvent]:
        """The scores in order."""
        return await generation.scores([partial(self._whole, *one) for one in zip(self._names, runs, strict=True)])

    async def _whole(self, name: str, run: Scoring) -> ScoreEvent:
        with self._told_under(name):
            return await run.whole()

    def _counted(self, before: int, tokens: int) -> int:
        """A single continuation has only its sequence's bound."""
        together = before + tokens
        if len(self._names) > 1 and together > MAX_TOKENS:
            told = f"got {together} tokens up to this one, the prompt's counted with each continuation"
            raise InvalidRequest.of(FIRST, f"{told}, wanted at most {MAX_TOKENS} in a call")
        return together

    @contextmanager
    def _told_under(self, name: str) -> Iterator[None]:
        """The errors of a continuation, under the client's name of it."""
        try:
            yield
        except InvalidRequest as error:
            if name == FIRST:
                raise
            told = [FieldError(self._renamed(p.field, name), p.message) for p in error.problems]
            raise InvalidRequest(told) from None

    def _renamed(self, field: str, name: str) -> str:
        """The library knows one list of ids; what is too long about it is the continuation."""
        known, bracket, place = field.partition("[")
        if known == "continuation_token_ids":
            return f"{name}{self._ids}{bracket}{place}"
        return name if known in (FIRST, "token_ids") else field


def _prompt_of(run: Scoring) -> tuple[int, ...]:
    return run.request.token_ids[: run.request.start]
