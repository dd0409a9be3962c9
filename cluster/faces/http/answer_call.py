"""A call for answers, read from its body: the common part of completions and chats. docs/api.md
describes every field.
"""

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cluster.faces.http.completion_models import AnswerRequest
from cluster.runs.choices import counts_of
from cluster.runs.generation import Ask
from cluster.runs.prompts import Given
from twotower.core import PARAMETERS, TRACE
from twotower.errors import FieldError, InvalidRequest

_OUTSIDE_NAMES = {name: parameter.http for name, parameter in {**PARAMETERS, "trace": TRACE}.items()}


@dataclass(frozen=True, slots=True)
class AnswerCall:
    """One Ask per prompt; for each, `tries` answers are decoded and `choices` of them returned.

    `id` is our unique id; `label` is the client's own name for the call, which other calls may share. `include_usage`:
    usage as a separate event at the end of a stream; `continuous_usage`: usage on every event. `rated`: whether
    log-probabilities are returned, with `numbered` tokens by their ids. `told_ids`: whether ids of prompt and answer
    are returned. `echo`: the prompts are returned, too; `answers`: whether answers are wanted as well. `names`: the
    client's names of fields that the library knows by other names.
    """

    id: str
    label: str
    model: str | None
    asks: tuple[Ask, ...]
    stream: bool
    include_usage: bool
    continuous_usage: bool
    choices: int = 1
    tries: int = 1
    rated: bool = False
    numbered: bool = False
    told_ids: bool = False
    echo: bool = False
    answers: bool = True
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The call's name in the log."""
        return f"{self.id} ({self.label})" if self.label else self.id

    @property
    def shown_id(self) -> str:
        return self.label or self.id

    @contextmanager
    def told_of(self, place: int | None = None) -> Iterator[None]:
        """The error of the prompt at this place, or of all answers of the call, in the client's words."""
        try:
            yield
        except InvalidRequest as error:
            raise self._outside(error, place) from None

    def _outside(self, error: InvalidRequest, place: int | None) -> InvalidRequest:
        prompt = self.names.get("prompt", "prompt")
        if place is None and self.tries > 1:  # the error is about their number
            prompt = "n" if self.tries == self.choices else "best_of"
        elif place is not None and len(self.asks) > 1:
            prompt = f"{prompt}[{place}]"
        return InvalidRequest([FieldError(self._outside_name(p.field, prompt), p.message) for p in error.problems])

    def _outside_name(self, name: str, prompt: str) -> str:
        if name == "prompt" or re.match(r"prompt_token_ids\b", name):
            return prompt + name.removeprefix("prompt_token_ids").removeprefix("prompt")
        return self.names.get(name) or _OUTSIDE_NAMES.get(name, name)


@dataclass(frozen=True, slots=True)
class Question:
    """The parts that the two kinds of body write differently."""

    prompts: Sequence[Given]
    params: dict[str, object]
    logprobs: object = None
    special_tokens: bool = True
    offsets: bool = True
    echo: bool = False
    answers: bool = True
    names: Mapping[str, str] = field(default_factory=dict)


def answer_call(read: AnswerRequest, question: Question, prefix: str, label: str) -> AnswerCall:
    """Reads everything except the parameters' values, which the library checks. Raises InvalidRequest."""
    params, prompts = question.params, question.prompts
    if params.get("top_k") == -1:  # off in vLLM, SGLang and Hugging Face
        params["top_k"] = 0
    trace = read.diffusion.trace
    if trace is True and not read.stream:
        raise InvalidRequest.of(TRACE.http, "got true, wanted it only with stream: true")
    choices, tries = counts_of(read.n, read.best_of, read.stream, len(prompts))
    rated = question.logprobs is not None
    logprobs = 0 if tries > choices and not rated else question.logprobs
    label = read.request_id or label  # empty: as over gRPC
    call_id = f"{prefix}-{uuid.uuid4().hex}"
    ids = [call_id] if len(prompts) == 1 else [f"{call_id}-{place}" for place in range(len(prompts))]
    special, offsets = question.special_tokens, question.offsets and rated
    with_stop = read.include_stop_str_in_output
    asks = tuple(
        Ask(prompt, params, read.stop, label, read.priority, own_id, trace, logprobs, special, offsets, with_stop)
        for prompt, own_id in zip(prompts, ids, strict=True)
    )
    return AnswerCall(
        id=call_id,
        label=label,
        model=read.model or None,
        asks=asks,
        stream=read.stream,
        include_usage=read.stream_options.include_usage,
        continuous_usage=read.stream_options.continuous_usage_stats,
        choices=choices,
        tries=tries,
        rated=rated,
        numbered=read.return_tokens_as_token_ids,
        told_ids=read.return_token_ids,
        echo=question.echo,
        answers=question.answers,
        names=question.names if rated else {**question.names, "logprobs": "best_of"},
    )
