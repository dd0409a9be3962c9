"""/tokenize, /detokenize, /tokenizer_info: the checkpoint's tokenizer, in vLLM's shapes. No cell has a part in it."""

from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import Field, WithJsonSchema

from cluster.faces.http.calls import begun, check_model
from cluster.faces.http.completion_models import IDS, Body, Label
from cluster.faces.http.request_body import BodyReader
from cluster.faces.http.strict_body import read_body
from cluster.runs.generation import Generation
from twotower.errors import FieldError, InvalidRequest
from twotower.showing import show

TOKENS = "a list of token ids"


class TokenizeBody(Body):
    """A prompt's text. `add_special_tokens`: those that a prompt of a completion gets, a BOS say."""

    prompt: Annotated[str, Field(description="a string")]
    model: Label = ""
    add_special_tokens: bool = True
    return_token_strs: bool = False


class Tokenized(Body):
    """`token_strs`: each token as the vocabulary writes it, where asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(Body):
    """The ids are taken as they come: the library checks them."""

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
        body: TokenizeBody = read_body(TokenizeBody, call.body, {})
        check_model(body.model or None, model.name)
        ids = await prompts.tokenized(body.prompt, call.deadline, body.add_special_tokens)
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
            text = await self._generation.prompts.detokenized(body.tokens, call.deadline)
        except InvalidRequest as error:
            raise _outside(error) from None
        return _answer(Detokenized(prompt=text))

    def info(self) -> dict[str, object]:
        """Raises InvalidRequest."""
        tokenizer = self._generation.model.tokenizer
        if tokenizer is None:
            raise InvalidRequest.of("tokenizer", "this checkpoint has no tokenizer")
        return dict(tokenizer.described)


def _answer(body: Body) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


def _outside(error: InvalidRequest) -> InvalidRequest:
    """The same problems under the names of this body."""
    names = ((problem.field.replace("prompt_token_ids", "tokens", 1), problem) for problem in error.problems)
    return InvalidRequest([FieldError("tokens" if name == "prompt" else name, p.message) for name, p in names])
