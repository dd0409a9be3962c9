"""A chat request, read from its body. docs/api.md tells every field."""

from collections.abc import Mapping

from cluster.faces.http.answer_call import AnswerCall, Question, answer_call
from cluster.faces.http.chat_messages import conversation_of
from cluster.faces.http.chat_models import ChatRequest
from cluster.faces.http.neutral_values import NEUTRAL_IN_CHATS
from cluster.faces.http.strict_body import read_body
from cluster.faces.http.structured import with_structured
from twotower.errors import InvalidRequest
from twotower.showing import show

_LONGEST = "max_completion_tokens"


def parse_chat(body: Mapping[str, object], label: str = "") -> AnswerCall:
    """Everything but the parameters' values, which the library checks. Raises InvalidRequest."""
    read: ChatRequest = read_body(ChatRequest, with_structured(body), NEUTRAL_IN_CHATS)
    params, names = read.params(), {"prompt": "messages"}
    if read.max_completion_tokens is not None:
        most = params.setdefault("max_new_tokens", read.max_completion_tokens)
        if most != read.max_completion_tokens:
            got = f"got {show(read.max_completion_tokens)} with max_tokens {show(most)}"
            raise InvalidRequest.of(_LONGEST, f"{got}, wanted one of them, or the same twice")
        names["max_new_tokens"] = _LONGEST
    if read.top_logprobs is not None and not read.logprobs:
        raise InvalidRequest.of("top_logprobs", f"got {show(read.top_logprobs)}, wanted it only with logprobs: true")
    logprobs = (0 if read.top_logprobs is None else read.top_logprobs) if read.logprobs else None
    if read.top_logprobs is not None:
        names["logprobs"] = "top_logprobs"
    chat = conversation_of(read.messages)
    question = Question([chat], params, logprobs, special_tokens=read.add_special_tokens, offsets=False, names=names)
    return answer_call(read, question, "chatcmpl", label)
