"""The bodies of /v1/chat/completions as pydantic models: OpenAI's, with seeds, steps and a `diffusion` object added."""

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from cluster.faces.http.chat_messages import MESSAGES, SCHEMA
from cluster.faces.http.completion_models import AnswerRequest, Body, Label, Usage, schema_of
from twotower.core import LOGPROBS, PARAMETERS, FinishReason

_MOST = PARAMETERS["max_new_tokens"]


class ChatRequest(AnswerRequest):
    """`max_completion_tokens` and `max_tokens` are the same. `add_special_tokens`: whether the tokenizer adds special
    tokens; by default the template writes them. `safety_identifier`, `prompt_cache_key`: labels without effect.
    """

    messages: Annotated[Any, WithJsonSchema(SCHEMA), Field(description=MESSAGES)]
    max_completion_tokens: Annotated[Any, schema_of(_MOST)] = None
    logprobs: bool = False
    top_logprobs: Annotated[Any, schema_of(LOGPROBS)] = LOGPROBS.default
    add_special_tokens: bool = False
    safety_identifier: Label = ""
    prompt_cache_key: Label = ""


class TokenLogProb(Body):
    """`bytes`: those of the token's text, if it identifies the token."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogProb(TokenLogProb):
    """A token of the answer, and the likeliest tokens at its place."""

    top_logprobs: list[TokenLogProb]


class ChatLogProbs(Body):
    """One entry for each token."""

    content: list[ContentLogProb]
    refusal: None = None


class AnswerMessage(Body):
    """The answer's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Body):
    """An answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogProbs | None
    finish_reason: FinishReason
    seed: int


class ChatCompletion(Body):
    """A whole answer."""

    id: str
    request_id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(Body):
    """What a chunk adds to an answer: `delta` first has the role, then text, and is empty beside the finish_reason."""

    index: int
    delta: dict[Literal["role", "content"], str]
    logprobs: ChatLogProbs | None
    finish_reason: FinishReason | None
    seed: int


class ChatChunk(Body):
    """One event of a stream."""

    id: str
    request_id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]


class ChatChunkAndUsage(ChatChunk):
    """A chunk with the call's usage."""

    usage: Usage
