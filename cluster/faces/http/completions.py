"""A text-completion request, read from its body. docs/api.md tells every field."""

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.faces.http.completion_models import CompletionRequest
from cluster.faces.http.neutral_values import NEUTRAL
from cluster.faces.http.strict_body import read_body
from cluster.faces.http.structured import with_structured
from cluster.runs.generation import Ask
from twotower.core import PARAMETERS, TRACE
from twotower.errors import FieldError, InvalidRequest

_OUTSIDE_NAMES = {name: parameter.http for name, parameter in {**PARAMETERS, "trace": TRACE}.items()}


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """A completion request: one Ask per prompt.

    `id` is ours and unlike any other; `label` is the client's own name for the call, which may be any other call's too.
    `include_usage`: an event of its own at the end of a stream; `continuous_usage`: on every event. `echo`: the prompts
    are told again; `answers`: not them alone.
    """

    id: str
    label: str
    model: str | None
    asks: tuple[Ask, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool
    echo: bool = False
    answers: bool = True

    @property
    def name(self) -> str:
        """For the log."""
        return f"{self.id} ({self.label})" if self.label else self.id


def parse_call(body: Mapping[str, object], label: str = "") -> CompletionCall:
    """Everything but the parameters' values, which the library checks. Raises InvalidRequest."""
    read: CompletionRequest = read_body(CompletionRequest, with_structured(body), NEUTRAL)
    params = read.params()
    if params.get("top_k") == -1:  # as vLLM, SGLang and Hugging Face say that it is off
        params["top_k"] = 0
    answers = not (read.echo and _is_zero(params.get("max_new_tokens")))
    if not answers:
        del params["max_new_tokens"]
    trace = read.diffusion.trace
    if trace is True and not read.stream:
        raise InvalidRequest.of(TRACE.http, "got true, wanted it only with stream: true")
    logprobs = None if read.logprobs is False else read.logprobs  # as the chat endpoint's clients say it is off
    label = read.request_id or label  # empty: as over gRPC
    call_id = f"cmpl-{uuid.uuid4().hex}"
    ids = [call_id] if len(read.prompt) == 1 else [f"{call_id}-{place}" for place in range(len(read.prompt))]
    asks = tuple(
        Ask(prompt, params, read.stop, label, read.priority, own_id, trace, logprobs)
        for prompt, own_id in zip(read.prompt, ids, strict=True)
    )
    options = read.stream_options
    usages = options.include_usage, options.continuous_usage_stats
    return CompletionCall(call_id, label, read.model or None, asks, read.stream, *usages, read.echo, answers)


def _is_zero(value: object) -> bool:
    return value == 0 and type(value) is int


def outside_problems(error: InvalidRequest, place: int | None = None) -> InvalidRequest:
    """The same problems under the names of this shape; `place` is the prompt's, where there are several."""
    prompt = "prompt" if place is None else f"prompt[{place}]"
    return InvalidRequest([FieldError(_outside_name(p.field, prompt), p.message) for p in error.problems])


def _outside_name(field: str, prompt: str) -> str:
    if field == "prompt" or re.match(r"prompt_token_ids\b", field):
        return prompt + field.removeprefix("prompt_token_ids").removeprefix("prompt")
    return _OUTSIDE_NAMES.get(field, field)
