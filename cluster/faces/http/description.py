"""/openapi.json: the HTTP face's requests and answers, generated from the models that read and write them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from pydantic_core import to_json

import twotower
from cluster.faces.http.chat_models import ChatChunk, ChatChunkAndUsage, ChatCompletion, ChatRequest
from cluster.faces.http.completion_models import Completion, CompletionAndUsage, CompletionRequest
from cluster.faces.http.neutral_values import NEUTRAL, NEUTRAL_IN_CHATS, Neutral
from cluster.faces.http.scores import Score, ScoreBody, Scores
from cluster.faces.http.tokens import DetokenizeBody, Detokenized, TokenizeBody, Tokenized

_REF = "#/components/schemas/{model}"
_ABOUT = (
    "docs/api.md in the source tree tells all of it. In a request null counts as not given, whatever the field. An "
    "unknown field is refused."
)
_ERROR = {
    "type": "object",
    "description": "Every error. `param`: the first wrong field.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_TRACE = {
    "type": "object",
    "description": "A named event, twotower.trace, with diffusion.trace: what a step fixed, or a round of drafts.",
    "required": ["object", "choices", "index"],
    "properties": {"object": {"const": "twotower.trace"}, "choices": {"const": []}, "index": {"type": "integer"}},
}
# Fields that are missing unless a request asks for them.
_WHERE_ASKED = {
    "Choice": "prompt_token_ids",
    "ChatCompletion": "prompt_token_ids",
    "ChatChoice": "token_ids",
    "ChatChunk": "prompt_token_ids",
    "ChatChunkAndUsage": "prompt_token_ids",
    "ChatChunkChoice": "token_ids",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `other`: another kind of answer. `events`: the events of its stream. An answer without a
    model is any JSON object.
    """

    method: str
    path: str
    summary: str
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    events: tuple[type[BaseModel], ...] = ()
    other: type[BaseModel] | None = None

    @property
    def name(self) -> str:
        words = "".join(letter if letter.isalnum() else " " for letter in f"{self.method} {self.path}").split()
        return "_".join(words)


OPERATIONS = (
    Operation(
        "post",
        "/v1/completions",
        "Answers to prompts",
        CompletionRequest,
        CompletionAndUsage,
        (Completion, CompletionAndUsage),
    ),
    Operation(
        "post",
        "/v1/chat/completions",
        "Answers to a chat",
        ChatRequest,
        ChatCompletion,
        (ChatChunk, ChatChunkAndUsage),
    ),
    Operation("post", "/v1/score", "Log-likelihoods of continuations after a prompt", ScoreBody, Score, other=Scores),
    Operation("post", "/tokenize", "The token ids of a text or of a chat", TokenizeBody, Tokenized),
    Operation("post", "/detokenize", "The text of token ids", DetokenizeBody, Detokenized),
    Operation("get", "/tokenizer_info", "The tokenizer's own description"),
    Operation("get", "/v1/models", "The one model that is served"),
    Operation("get", "/v1/models/{name}", "The same; 404 for another name"),
    Operation("get", "/health", "200 while a router lives"),
    Operation("get", "/ready", "200 while a cell serves, else 503; `modes`: whether each mode is served now"),
    Operation("get", "/version", "The service's version"),
)
_NEUTRAL: Mapping[type[BaseModel], Mapping[str, Neutral]] = {
    CompletionRequest: NEUTRAL,
    ChatRequest: NEUTRAL_IN_CHATS,
}


@cache
def openapi() -> bytes:
    """The document, the same for all services of a version."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    key = {"type": "http", "scheme": "bearer", "description": "where ingress.keys_file names keys"}
    return to_json(
        {
            "openapi": "3.1.0",
            "info": {"title": "TwoTower Serve", "version": twotower.__version__, "description": _ABOUT},
            "paths": paths,
            "components": {"schemas": _schemas(), "securitySchemes": {"key": key}},
            "security": [{}, {"key": []}],
        }
    )


def _described(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _answer(operation)}}
    if operation.events:
        kinds: list[Any] = [*map(_ref, operation.events), *({"$ref": _REF.format(model=n)} for n in ("Trace", "Error"))]
        content["text/event-stream"] = {"schema": {"anyOf": kinds}}
    error = {
        "description": "an error",
        "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
    }
    told: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {"200": {"description": "the answer", "content": content}, "default": error},
    }
    if operation.body is not None:
        body = {"application/json": {"schema": _ref(operation.body)}}
        told["requestBody"] = {"required": True, "content": body}
    if "{name}" in operation.path:
        told["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    return told


def _answer(operation: Operation) -> dict[str, Any]:
    kinds = [_ref(model) for model in (operation.answer, operation.other) if model is not None]
    return {"anyOf": kinds} if len(kinds) > 1 else next(iter(kinds), {"type": "object"})


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _schemas() -> dict[str, Any]:
    """The schemas of all models, including inner ones."""
    bodies = [(one.body, "validation") for one in OPERATIONS if one.body is not None]
    answers = [
        (m, "serialization") for one in OPERATIONS for m in (one.answer, one.other, *one.events) if m is not None
    ]
    _, made = models_json_schema([*bodies, *answers], ref_template=_REF)  # type: ignore[list-item]
    schemas: dict[str, Any] = dict(made["$defs"])
    for model, neutral in _NEUTRAL.items():
        _add_neutral(schemas, model.__name__, neutral)
    for name, field in _WHERE_ASKED.items():
        ids = {"type": "array", "items": {"type": "integer"}, "description": "with return_token_ids"}
        schemas[name]["properties"][field] = ids
    return {**schemas, "Trace": _TRACE, "Error": _ERROR}


def _add_neutral(schemas: dict[str, Any], name: str, neutral: Mapping[str, Neutral]) -> None:
    for field, schema in _neutral_fields(neutral):
        outer, _, inner = field.rpartition(".")
        of = {"": name, "stream_options": "StreamOptions"}[outer]
        schemas[of]["properties"][inner] = schema


def _neutral_fields(neutral: Mapping[str, Neutral]) -> Iterator[tuple[str, dict[str, Any]]]:
    for field, taken in neutral.items():
        yield field, {"enum": [*taken.values, None], "description": f"accepted only without an effect ({taken.source})"}
