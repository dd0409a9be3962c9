"""/tokenize, /detokenize, /tokenizer_info: the checkpoint's tokenizer, in vLLM's shapes. They need no cell."""

from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import Field, WithJsonSchema

from cluster.faces.http.calls import begun, check_model
from cluster.faces.http.chat_messages import SCHEMA, conversation_of
from cluster.faces.http.completion_models import IDS, Body, Label
from cluster.faces.http.neutral_values import NEUTRAL_IN_CHATS
from cluster.faces.http.request_body import BodyReader
from cluster.faces.http.strict_body import read_body
from cluster.runs.deadline import Deadline
from cluster.runs.generation import Generation
from cluster.runs.prompts import Prompts
from twotower.errors import FieldError, InvalidRequest
from twotower.showing import show
from twotower.text.tokenizer import Tokenizer, around_text

TOKENS = "a list of token ids"
_OF_CHATS = ("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs", "tools")
_NEUTRAL = {name: NEUTRAL_IN_CHATS[name] for name in _OF_CHATS}


class TokenizeBody(Body):
    """A prompt's text, or a chat's messages. `add_special_tokens`: whether the tokenizer adds special tokens, such as a
    BOS. By default it adds them to a prompt's text only, because a chat's template writes them.
    """

    prompt: str | None = None
    messages: Annotated[Any, WithJsonSchema(SCHEMA)] = None
    model: Label = ""
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class Tokenized(Body):
    """`token_strs`: each token as the vocabulary writes it, if requested."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(Body):
    """The ids are not checked here; the library checks them."""

    tokens: Annotated[Any, WithJsonSchema(IDS), Field(description=TOKENS)]
    model: Label = ""


class Detokenized(Body):
    """The text of the tokens, special ones written out."""

    prompt: str


class TokensFace:
    """Answers the calls of one router."""

    def __init__(self, generation: Generation, bodies: BodyReader) -> None:
        self._generation, self._bodies = generation, bodies

    async def tokenize(self, request: Request) -> Response:
        prompts, model = self._generation.prompts, self._generation.model
        call = await begun(request, self._generation, self._bodies)
        body: TokenizeBody = read_body(TokenizeBody, call.body, _NEUTRAL)
        check_model(body.model or None, model.name)
        with self._generation.hold(caller=call.caller):
            ids = await _tokenized(prompts, body, call.deadline)
            strings = await prompts.tokens(ids, call.deadline) if body.return_token_strs else None
        longest = model.limits.max_sequence_length
        return _answer(Tokenized(count=len(ids), max_model_len=longest, tokens=list(ids), token_strs=strings))

    async def detokenize(self, request: Request) -> Response:
        call = await begun(request, self._generation, self._bodies)
        body: DetokenizeBody = read_body(DetokenizeBody, call.body, {})
        check_model(body.model or None, self._generation.model.name)
        if not isinstance(body.tokens, list):
            raise InvalidRequest.of("tokens", f"got {show(body.tokens)}, wanted {TOKENS}")
        try:
            with self._generation.hold(caller=call.caller):
                text = await self._generation.prompts.detokenized(body.tokens, call.deadline)
        except InvalidRequest as error:
            raise _outside(error) from None
        return _answer(Detokenized(prompt=text))

    def info(self) -> dict[str, object]:
        """Includes the served chat template and the special tokens that the service adds. Raises InvalidRequest."""
        model = self._generation.model
        if model.tokenizer is None:
            raise InvalidRequest.of("tokenizer", "this checkpoint has no tokenizer")
        template = model.chat_template
        described = model.tokenizer.described
        return {
            **described,
            "chat_template": None if template is None else template.source,
            **_added(model.tokenizer, described.get("bos_token")),
        }


def _added(tokenizer: Tokenizer, bos: object) -> dict[str, object]:
    """The special tokens of text prompts. Everything else is taken as it is; a chat's template writes its special
    tokens.
    """
    before, after = around_text(tokenizer)
    nothing: dict[str, list[str]] = {"before": [], "after": []}
    around = {"text_prompt": {"before": before, "after": after}, "chat": nothing}
    around |= {"token_ids": nothing, "continuation": nothing}
    return {"text_prompt_gets_bos": bos in before, "special_tokens_added": around}


async def _tokenized(prompts: Prompts, body: TokenizeBody, deadline: Deadline) -> tuple[int, ...]:
    """Raises InvalidRequest."""
    if (body.prompt is None) is (body.messages is None):
        raise InvalidRequest.of("prompt", "wanted a prompt, which is a string, or messages, and not both")
    if body.prompt is not None:
        return await prompts.tokenized(body.prompt, deadline, body.add_special_tokens is not False)
    try:
        return await prompts.tokenized(conversation_of(body.messages), deadline, body.add_special_tokens is True)
    except InvalidRequest as error:
        told = [FieldError("messages" if p.field == "prompt" else p.field, p.message) for p in error.problems]
        raise InvalidRequest(told) from None


def _answer(body: Body) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


def _outside(error: InvalidRequest) -> InvalidRequest:
    """The same problems under the names of this body."""
    names = ((problem.field.replace("prompt_token_ids", "tokens", 1), problem) for problem in error.problems)
    return InvalidRequest([FieldError("tokens" if name == "prompt" else name, p.message) for name, p in names])
