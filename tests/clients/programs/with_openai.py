"""OpenAI's library for Python against a service, with models of pydantic: `with_openai.py URL`. Prints JSON.

What the model writes is its own affair. That it is what was asked for, the library checks: it reads each answer into
the model, and raises where it cannot.
"""

import json
import sys
from typing import Any, Literal

import openai
from pydantic import BaseModel, ConfigDict


class Number(BaseModel):
    """Without blanks between its parts, of which a small model may write any number."""

    model_config = ConfigDict(json_schema_extra={"x-guidance": {"whitespace_flexible": False}})

    tens: Literal["twenty", "thirty"]
    is_even: bool


CLIENT = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
ASKED: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "words: 2009"}],
    "max_completion_tokens": 100,
}


def parsed(mode: str) -> dict[str, Any]:
    more = {"diffusion": {"mode": mode}}
    [choice] = CLIENT.chat.completions.parse(**ASKED, response_format=Number, extra_body=more).choices
    assert isinstance(choice.message.parsed, Number)
    return choice.message.parsed.model_dump()


def streamed() -> dict[str, Any]:
    """The parts, as they come, and the whole in the end."""
    with CLIENT.chat.completions.stream(**ASKED, response_format=Number) as stream:
        parts = [event.delta for event in stream if event.type == "content.delta"]
        [choice] = stream.get_final_completion().choices
    assert isinstance(choice.message.parsed, Number)
    return {"joined": json.loads("".join(parts)), "whole": choice.message.parsed.model_dump()}


def plain() -> str:
    with CLIENT.chat.completions.stream(**ASKED) as stream:
        parts = [event.delta for event in stream if event.type == "content.delta"]
        assert "".join(parts) == stream.get_final_completion().choices[0].message.content
    return "".join(parts)


def refused() -> str:
    try:
        CLIENT.chat.completions.create(**ASKED, frequency_penalty=1.0, extra_body={"diffusion": {"mode": "diffusion"}})
    except openai.BadRequestError as error:
        return str(error.param)
    return "not refused"


in_modes = {mode: parsed(mode) for mode in ("ar", "verified", "diffusion")}
print(json.dumps({"parsed": in_modes, "streamed": streamed(), "plain": plain(), "refused": refused()}))
