"""/v1/score: log-likelihoods of given continuations of a given prompt under the context tower."""

import asyncio
import math
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator

from cluster.faces.http.answer_bodies import encoded, spliced
from cluster.faces.http.calls import CALL, begun, check_model
from cluster.faces.http.completion_models import IDS, TEXT, Body, Label, PromptTokensDetails, schema_of
from cluster.faces.http.request_body import BodyReader
from cluster.faces.http.strict_body import read_body
from cluster.runs.choices import MAX_PROMPTS
from cluster.runs.continuations import FIRST, Continuations
from cluster.runs.generation import Generation
from cluster.runs.run import Scoring
from cluster.runs.streams import until_disconnect
from twotower.core import PRIORITY, ScoreEvent
from twotower.errors import FieldError, InvalidRequest
from twotower.showing import show

PART = "a string or a list of token ids"
PARTS = f"a list of 1 to {MAX_PROMPTS} strings, or of as many lists of token ids"
_SEVERAL = [{"type": "array", "items": item, "minItems": 1, "maxItems": MAX_PROMPTS} for item in (TEXT, IDS)]


def _part(value: object) -> object:
    if not isinstance(value, str | list):
        raise ValueError(f"got {show(value)}, wanted {PART}")
    return value


def _parts(value: object) -> object:
    if not isinstance(value, list) or not value:
        raise ValueError(f"got {show(value)}, wanted {PARTS}")
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"got {len(value)} continuations, wanted at most {MAX_PROMPTS}")
    kind = type(value[0])
    odd = next((place for place, one in enumerate(value) if type(one) is not kind or kind not in (str, list)), None)
    if odd is not None:
        raise ValueError(f"got {show(value[odd])} at place {odd}, wanted {PARTS}")
    return value


Part = Annotated[Any, AfterValidator(_part), WithJsonSchema({"anyOf": [TEXT, IDS]}), Field(description=PART)]
Several = Annotated[Any, AfterValidator(_parts), WithJsonSchema({"anyOf": _SEVERAL}), Field(description=PARTS)]


class ScoreBody(Body):
    """The ids are not checked here; the library checks them. The body has either `continuation` or `continuations`."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["continuation"]}, {"required": ["continuations"]}]}
    )

    prompt: Part
    continuations: Several = None
    continuation: Part = Field(None, validate_default=True)
    model: Label = ""
    priority: Annotated[Any, schema_of(PRIORITY)] = PRIORITY.default
    request_id: Label = ""
    user: Label = ""

    @field_validator("continuation", mode="before")
    @classmethod
    def _one_of_both(cls, value: object, info: ValidationInfo) -> object:
        wrong = "continuations" not in info.data  # which is told
        if value is None and not wrong and info.data["continuations"] is None:
            raise ValueError(f"missing, wanted {PART}, or continuations")
        if value is not None and not wrong and info.data["continuations"] is not None:
            raise ValueError("got it beside continuations, wanted one of them")
        return "" if value is None else value

    @property
    def named(self) -> list[tuple[str, Any]]:
        """The continuations to score, each under its name."""
        if self.continuations is None:
            return [(FIRST, self.continuation)]
        return [(f"continuations[{place}]", one) for place, one in enumerate(self.continuations)]


class Scored(Body):
    """`log_probs`: each token's natural log-probability after all tokens before it. `is_greedy`: whether `ar` at
    temperature 0 would have chosen it. `texts`: each token on its own, for display; none without a tokenizer.
    """

    token_ids: list[int]
    texts: list[str]
    log_probs: list[float]
    is_greedy: list[bool]
    sum_log_prob: float


class _AnyScore(Body):
    """The common fields of both answers. `prompt_tokens_details`: of the first continuation."""

    id: str
    request_id: str
    object: Literal["score", "scores"]
    model: str
    prompt_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Score(Scored, _AnyScore):
    """The answer to `continuation`."""

    object: Literal["score"] = "score"


class Scores(_AnyScore):
    """The answer to `continuations`, in order."""

    object: Literal["scores"] = "scores"
    scores: list[Scored]


class ScoresFace:
    """Answers the calls of one router."""

    def __init__(self, generation: Generation, bodies: BodyReader) -> None:
        self._generation, self._bodies = generation, bodies

    async def answer(self, request: Request) -> Response:
        generation = self._generation
        call = await begun(request, generation, self._bodies)
        body: ScoreBody = read_body(ScoreBody, call.body, {})
        own_id, label = f"score-{uuid.uuid4().hex}", body.request_id or call.outer_id
        request.scope[CALL] = f"{own_id} ({label})" if label else own_id
        check_model(body.model or None, generation.model.name)
        asked = Continuations(body.prompt, body.named, label, body.priority, own_id)
        try:
            checked = asked.checked(generation)
            with generation.hold(checked, call.caller):
                runs = await asked.runs(generation, checked, call.deadline, call.caller, call.parent)
                events = await until_disconnect(request.receive, asked.scores(generation, runs))
        except InvalidRequest as error:
            raise _outside(error) from None
        around: dict[str, Any] = {"id": own_id, "request_id": label or own_id, "model": generation.model.name}
        told = await self._told(body, around, runs, events)
        return Response(told, headers=call.headers(label or own_id), media_type="application/json")

    async def _told(
        self, body: ScoreBody, around: dict[str, Any], runs: Sequence[Scoring], events: Sequence[ScoreEvent]
    ) -> bytes:
        """The answer may be very long, so the loop runs other tasks meanwhile."""
        details = PromptTokensDetails(cached_tokens=events[0].cached_tokens)
        around = {**around, "prompt_tokens": runs[0].request.start, "prompt_tokens_details": details}
        if body.continuations is None:
            return encoded(Score(**around, **self._scored(runs[0], events[0])))
        scores = []
        for run, event in zip(runs, events, strict=True):
            scores.append(encoded(Scored(**self._scored(run, event))))
            await asyncio.sleep(0)
        return spliced(encoded(Scores(**around, scores=[])), b'"scores":[]', scores)

    def _scored(self, run: Scoring, event: ScoreEvent) -> dict[str, Any]:
        token_ids = run.request.token_ids[run.request.start :]
        return {
            "token_ids": list(token_ids),
            "texts": list(self._generation.token_texts.of(token_ids)),
            "log_probs": list(event.log_probs),
            "is_greedy": list(event.is_greedy),
            "sum_log_prob": math.fsum(event.log_probs),
        }


def _outside(error: InvalidRequest) -> InvalidRequest:
    """The same problems under the names of this body."""
    return InvalidRequest([FieldError(_outside_name(problem.field), problem.message) for problem in error.problems])


def _outside_name(field: str) -> str:
    """The library knows one list of ids; what is too long about it is the continuation."""
    return "continuation" if field == "token_ids" else field.replace("_token_ids", "", 1)
