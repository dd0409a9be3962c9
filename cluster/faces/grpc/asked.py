"""A GenerateRequest's fields beside its parameters: the prompt, the number of answers, the echo."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.faces.grpc.wire_params import given_in
from cluster.faces.http.chat_messages import conversation_of
from cluster.runs.choices import counts_of
from cluster.runs.generation import Ask
from cluster.runs.prompts import Given
from twotower.errors import FieldError, InvalidRequest
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.text.chat_template import Conversation


@dataclass(frozen=True, slots=True)
class Asked:
    """`tries` answers are decoded and `choices` of them returned; `rated`: with likelihoods. `echo`: the prompt is
    returned, too; `answers`: whether answers are wanted as well.
    """

    ask: Ask
    choices: int
    tries: int
    rated: bool
    echo: bool
    answers: bool

    @property
    def shown_id(self) -> str:
        return self.ask.label or self.ask.id

    @property
    def names(self) -> Mapping[str, str]:
        """The client's names of fields that the check over all answers knows by other names."""
        several = "n" if self.tries == self.choices else "best_of"
        names = {"prompt": several} if self.tries > 1 else {}
        return names if self.rated or self.tries == self.choices else {**names, "logprobs": "best_of"}


def asked_of(request: pb.GenerateRequest, label: str, own_id: str, streams: bool) -> Asked:
    """Only the fields that the client gave; the library checks the parameters. Raises InvalidRequest."""
    n = request.n if request.HasField("n") else 1
    choices, tries = counts_of(n, request.best_of if request.HasField("best_of") else None, streams)
    params, rated = given_in(request.params), request.HasField("logprobs")
    if request.echo:
        _check_echo(request, tries, streams)
    answers = not (request.echo and params.get("max_new_tokens") == 0)
    if not answers:
        del params["max_new_tokens"]
    told = request.logprobs if rated else None
    ask = Ask(
        _prompt(request),
        params,
        request.stop,
        label,
        request.priority,
        own_id,
        request.trace,
        0 if tries > choices and not rated else told,
        _special_tokens(request),
        with_stop=request.include_stop_str_in_output,
    )
    return Asked(ask, choices, tries, rated, request.echo, answers)


def tokenized_of(request: pb.TokenizeRequest) -> tuple[str | Conversation, bool]:
    """The text or chat to tokenize, and whether special tokens are added. Raises InvalidRequest."""
    if not request.HasField("chat"):
        return request.text, request.add_special_tokens or not request.HasField("add_special_tokens")
    if request.text:
        raise InvalidRequest.of("chat", "got it beside text, wanted one of them")
    return conversation(request.chat), request.add_special_tokens


def conversation(chat: pb.Chat) -> Conversation:
    """Raises InvalidRequest."""
    return conversation_of([_message(message) for message in chat.messages])


@contextmanager
def told_as(names: Mapping[str, str]) -> Iterator[None]:
    """The errors under the client's names."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest([FieldError(names.get(p.field, p.field), p.message) for p in error.problems]) from None


def _message(message: pb.ChatMessage) -> dict[str, str]:
    named = {"name": message.name} if message.name else {}
    return {"role": message.role, "content": message.content, **named}


def _check_echo(request: pb.GenerateRequest, tries: int, streams: bool) -> None:
    """Raises InvalidRequest."""
    wanted = {
        "only of Generate": not streams,
        "only of text or token_ids": request.WhichOneof("prompt") != "chat",
        "only where n and best_of are 1": tries == 1,
    }
    for told, is_so in wanted.items():
        if not is_so:
            raise InvalidRequest.of("echo", f"got true, wanted it {told}")


def _prompt(request: pb.GenerateRequest) -> Given:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "token_ids":
            ids: Sequence[object] = request.token_ids.ids
            return ids
        case "chat":
            return conversation(request.chat)
    raise InvalidRequest.of("prompt", "missing, wanted text, token_ids or chat")


def _special_tokens(request: pb.GenerateRequest) -> bool:
    """A chat's template writes its special tokens."""
    if request.HasField("add_special_tokens"):
        return bool(request.add_special_tokens)
    return bool(request.WhichOneof("prompt") != "chat")
