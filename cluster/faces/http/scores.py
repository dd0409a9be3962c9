"""/v1/score: how likely the context tower finds a given continuation of a given prompt."""

import math
import uuid
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from pydantic import AfterValidator, Field, WithJsonSchema

from cluster.faces.http.calls import CALL, begun, check_model
from cluster.faces.http.completion_models import IDS, TEXT, Body, Label, PromptTokensDetails, schema_of
from cluster.faces.http.request_body import BodyReader
from cluster.faces.http.strict_body import read_body
from cluster.runs.generation import Generation, ScoreAsk
from cluster.runs.run import Scoring
from cluster.runs.streams import until_disconnect
from twotower.core import PRIORITY, ScoreEvent
from twotower.errors import FieldError, InvalidRequest
from twotower.showing import show

PART = "a string or a list of token ids"


def _part(value: object) -> object:
    if not isinstance(value, str | list):
        raise ValueError(f"got {show(value)}, wanted {PART}")
    return value


Part = Annotated[Any, AfterValidator(_part), WithJsonSchema({"anyOf": [TEXT, IDS]}), Field(description=PART)]


class ScoreBody(Body):
    """The ids are taken as they come: the library checks them."""

    prompt: Part
    continuation: Part
    model: Label = ""
    priority: Annotated[Any, schema_of(PRIORITY)] = PRIORITY.default
    request_id: Label = ""
    user: Label = ""


class Score(Body):
    """Of each token of the continuation, after all before it: `log_probs` (natural), and whether `ar` at temperature 0
    would have chosen it. `texts`: of each token on its own, for showing; none where the checkpoint has no tokenizer."""

    id: str
    request_id: str
    object: Literal["score"] = "score"
    model: str
    prompt_tokens: int
    prompt_tokens_details: PromptTokensDetails
    token_ids: list[int]
    texts: list[str]
    log_probs: list[float]
    is_greedy: list[bool]
    sum_log_prob: float


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
        try:
            checked = generation.check_score(ScoreAsk(body.prompt, body.continuation, label, body.priority, own_id))
            with generation.hold([checked], call.caller):
                run = await generation.score_run(checked, call.deadline, call.caller, call.parent)
                event = await until_disconnect(request.receive, run.whole())
        except InvalidRequest as error:
            raise _outside(error) from None
        told = self._score(run, event, own_id, label or own_id)
        return Response(told.model_dump_json(), headers=call.headers(label or own_id), media_type="application/json")

    def _score(self, run: Scoring, event: ScoreEvent, own_id: str, shown_id: str) -> Score:
        scored = run.request
        token_ids = scored.token_ids[scored.start :]
        return Score(
            id=own_id,
            request_id=shown_id,
            model=self._generation.model.name,
            prompt_tokens=scored.start,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=event.cached_tokens),
            token_ids=list(token_ids),
            texts=list(self._generation.token_texts.of(token_ids)),
            log_probs=list(event.log_probs),
            is_greedy=list(event.is_greedy),
            sum_log_prob=math.fsum(event.log_probs),
        )


def _outside(error: InvalidRequest) -> InvalidRequest:
    """The same problems under the names of this body."""
    return InvalidRequest([FieldError(_outside_name(problem.field), problem.message) for problem in error.problems])


def _outside_name(field: str) -> str:
    """The library knows one list of ids; what is too long about it is the continuation."""
    return "continuation" if field == "token_ids" else field.replace("_token_ids", "", 1)
