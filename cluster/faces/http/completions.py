"""A text-completion request, read from its body. docs/api.md tells every field."""

from collections.abc import Mapping

from cluster.faces.http.answer_call import AnswerCall, Question, answer_call
from cluster.faces.http.completion_models import CompletionRequest
from cluster.faces.http.neutral_values import NEUTRAL
from cluster.faces.http.strict_body import read_body
from cluster.faces.http.structured import with_structured
from twotower.errors import InvalidRequest


def parse_call(body: Mapping[str, object], label: str = "") -> AnswerCall:
    """Everything but the parameters' values, which the library checks. Raises InvalidRequest."""
    read: CompletionRequest = read_body(CompletionRequest, with_structured(body), NEUTRAL)
    params = read.params()
    answers = not (read.echo and _is_zero(params.get("max_new_tokens")))
    if not answers:
        del params["max_new_tokens"]
    logprobs = None if read.logprobs is False else read.logprobs  # as the chat endpoint's clients say it is off
    question = Question(
        read.prompt, params, logprobs, special_tokens=read.add_special_tokens, echo=read.echo, answers=answers
    )
    call = answer_call(read, question, "cmpl", label)
    if call.echo and call.tries > 1:
        raise InvalidRequest.of("echo", "got true, wanted it only where n and best_of are 1")
    return call


def _is_zero(value: object) -> bool:
    return value == 0 and type(value) is int
