"""The bodies of /v1/completions as pydantic models: OpenAI's, with token ids, steps and a `diffusion` object added.

Parameters are fields as `twotower.core` declares them. Their values, like the prompt's ids, are not checked or copied
here. The library checks them, and lists may be far too long to be copied before they are counted.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    field_validator,
)

from cluster.runs.choices import BEST_OF, MAX_PROMPTS, N
from twotower.core import LOGPROBS, PARAMETERS, PRIORITY, STOP, TRACE, FinishReason, Mode
from twotower.parameters import Parameter
from twotower.showing import show

MAX_LABEL = 512

TEXT: dict[str, Any] = {"type": "string"}
IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PARTS: list[dict[str, Any]] = [{"type": "array", "items": item, "maxItems": MAX_PROMPTS} for item in (TEXT, IDS)]
PROMPT = "a string, a list of token ids, or a list of either"


class Body(BaseModel):
    """Strict types, no unknown names, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def schema_of(parameter: Parameter) -> WithJsonSchema:
    """The schema of a field that takes this parameter."""
    return WithJsonSchema({**parameter.kind.schema, "description": parameter.meaning})


def _declared(outer: str) -> dict[str, Any]:
    """The parameters that are fields of this object (empty: of the body itself); None means not given."""
    places = {parameter.http.rpartition("."): parameter for parameter in PARAMETERS.values()}
    return {
        own: (Annotated[Any, schema_of(parameter)], None) for (o, _, own), parameter in places.items() if o == outer
    }


def _prompts(value: object) -> Sequence[Any]:
    """One prompt or many: a string, token ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(f"got {show(value)}, wanted {PROMPT}")
    if not value or type(value[0]) not in (str, list):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"got {len(value)} prompts, wanted at most {MAX_PROMPTS}")
    return value if len(set(map(type, value))) == 1 else [value]


Label = Annotated[str, Field(max_length=MAX_LABEL)]
Prompts = Annotated[Any, AfterValidator(_prompts), WithJsonSchema({"anyOf": [TEXT, IDS, *_PARTS]})]
_Parameters: Any = create_model("_Parameters", __base__=Body, **_declared(""))
_Diffusion: Any = create_model("_Diffusion", __base__=Body, **_declared("diffusion"))


class Diffusion(_Diffusion):  # type: ignore[misc]
    """The parameters that OpenAI lacks."""

    trace: Annotated[Any, schema_of(TRACE)] = TRACE.default


class StreamOptions(Body):
    """`include_usage`: usage as a separate event at the end; `continuous_usage_stats`: usage so far on every event."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class AnswerRequest(_Parameters):  # type: ignore[misc]
    """The common fields of calls for answers, beside the prompt or messages."""

    model: Label = ""
    diffusion: Diffusion = Diffusion()
    stop: Annotated[Any, schema_of(STOP)] = ()
    priority: Annotated[Any, schema_of(PRIORITY)] = PRIORITY.default
    n: Annotated[Any, schema_of(N)] = N.default
    best_of: Annotated[Any, schema_of(BEST_OF)] = BEST_OF.default
    include_stop_str_in_output: bool = Field(False, description="the text ends after a stop string, not before it")
    return_token_ids: bool = Field(False, description="return the prompt's ids, too; in a chat also the answer's")
    return_tokens_as_token_ids: bool = Field(False, description="name tokens in logprobs by their ids")
    stream: bool = Field(False, description="answer with server-sent events")
    stream_options: StreamOptions = StreamOptions()
    request_id: Label = Field("", description="the client's name for the call")
    user: Label = Field("", description="a label without effect")

    @field_validator("stream_options")
    @classmethod
    def _only_of_streams(cls, options: StreamOptions, info: ValidationInfo) -> StreamOptions:
        if (options.include_usage or options.continuous_usage_stats) and not info.data.get("stream"):
            raise ValueError("only with stream: true")
        return options

    def params(self) -> dict[str, object]:
        """The given fields of DecodingParams, by their names there."""
        given = {}
        for name, parameter in PARAMETERS.items():
            outer, _, own = parameter.http.rpartition(".")
            value = getattr(getattr(self, outer) if outer else self, own)
            if value is not None:
                given[name] = value
        return given


class CompletionRequest(AnswerRequest):
    """`prompt` as a list of prompts, whatever its shape was. `add_special_tokens`: whether the tokenizer adds special
    tokens, such as a BOS.
    """

    prompt: Annotated[Prompts, Field(description=PROMPT)]
    logprobs: Annotated[Any, schema_of(LOGPROBS)] = LOGPROBS.default
    echo: bool = False
    add_special_tokens: bool = True

    @field_validator("echo")
    @classmethod
    def _only_of_whole_answers(cls, echo: bool, info: ValidationInfo) -> bool:
        if echo and info.data.get("stream"):
            raise ValueError("got true, wanted it only without stream")
        return echo


class PromptTokensDetails(Body):
    """`cached_tokens`: tokens of the prompts that a cell had read for another request."""

    cached_tokens: int


class Usage(Body):
    """The cost of a call over all its prompts, and its mode. `tokens_per_step`: completion_tokens ÷ num_steps; null
    without steps, as in `ar`.
    """

    prompt_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens: int
    total_tokens: int
    num_steps: int
    num_blocks: int
    num_drafted: int
    num_accepted: int
    num_ar_blocks: int
    num_diffusion_blocks: int
    tokens_per_step: float | None
    mode: Mode


class LogProbs(Body):
    """For each token: its name, its log-probability, the likeliest tokens and itself by name, and where its text begins
    in the answer's. `confidence`: in `diffusion`, the denoiser's probability of the token when it was fixed. Values may
    be null: a prompt's first token follows nothing, and a prompt has no confidence.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    confidence: list[float | None] | None = None


class Choice(Body):
    """An answer, or what a chunk adds to it."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: LogProbs | None
    finish_reason: FinishReason | None
    seed: int


class Completion(Body):
    """A whole answer, or one event of a stream."""

    id: str
    request_id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]


class CompletionAndUsage(Completion):
    """One that tells what the call has used."""

    usage: Usage
