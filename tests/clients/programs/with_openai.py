"""OpenAI's library for Python against a service: completions, chats with models of pydantic, models, its exceptions:
`with_openai.py URL`. Prints JSON.

What the model writes into a structure is its own affair. That it is what was asked for, the library checks: it reads
each answer into the model, and raises where it cannot.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import openai
from pydantic import BaseModel, ConfigDict


class Number(BaseModel):
    """Without blanks between its parts, of which a small model may write any number."""

    model_config = ConfigDict(json_schema_extra={"x-guidance": {"whitespace_flexible": False}})

    tens: Literal["twenty", "thirty"]
    is_even: bool


SETTINGS: dict[str, Any] = {"base_url": sys.argv[1] + "/v1", "api_key": "none", "max_retries": 0}
CLIENT = openai.OpenAI(**SETTINGS)
PROMPT: dict[str, Any] = {"model": "demo", "prompt": "words: 2009\n", "max_tokens": 32}
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


def completions() -> dict[str, Any]:
    parts = list(CLIENT.completions.create(**PROMPT, stream=True, stream_options={"include_usage": True}))
    rated = CLIENT.completions.create(**PROMPT, logprobs=2).choices[0].logprobs
    several = CLIENT.completions.create(**PROMPT, n=3, temperature=1.0, seed=1)
    scored = CLIENT.completions.create(**{**PROMPT, "max_tokens": 0}, echo=True, logprobs=0).choices[0]
    assert rated is not None and scored.logprobs is not None
    return {
        "whole": CLIENT.completions.create(**PROMPT).choices[0].text,
        "streamed": "".join(choice.text for part in parts for choice in part.choices),
        "used": [part.usage.completion_tokens for part in parts if part.usage is not None],
        "several": [choice.index for choice in several.choices],
        "rated": [rated.tokens, rated.token_logprobs, [len(top) for top in rated.top_logprobs or ()]],
        "echoed": CLIENT.completions.create(**PROMPT, echo=True).choices[0].text,
        "scored": [scored.text, scored.logprobs.token_logprobs],
    }


def chats() -> dict[str, Any]:
    whole = CLIENT.chat.completions.create(**ASKED, n=2, logprobs=True, top_logprobs=1)
    parts = CLIENT.chat.completions.create(**ASKED, stream=True)
    return {
        "whole": [choice.message.content for choice in whole.choices],
        "rated": [len(choice.logprobs.content or ()) for choice in whole.choices if choice.logprobs is not None],
        "streamed": "".join(choice.delta.content or "" for part in parts for choice in part.choices),
    }


async def asynchronous() -> dict[str, Any]:
    async with openai.AsyncOpenAI(**SETTINGS) as client:
        parts = await client.completions.create(**PROMPT, stream=True)
        streamed = [choice.text async for part in parts for choice in part.choices]
        chat_parts = await client.chat.completions.create(**ASKED, stream=True)
        chat_streamed = [choice.delta.content or "" async for part in chat_parts for choice in part.choices]
        return {
            "whole": (await client.completions.create(**PROMPT)).choices[0].text,
            "streamed": "".join(streamed),
            "chat": (await client.chat.completions.create(**ASKED)).choices[0].message.content,
            "chat streamed": "".join(chat_streamed),
            "models": [model.id async for model in client.models.list()],
        }


def raised(call: Callable[[], object]) -> list[Any]:
    try:
        call()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.param, error.code]
    except openai.APIError as error:
        return [type(error).__name__]
    return []


def exceptions() -> dict[str, list[Any]]:
    create, long = CLIENT.completions.create, {**PROMPT, "max_tokens": 900, "extra_body": {"ignore_eos": True}}
    return {
        "wrong": raised(lambda: create(**PROMPT, temperature=-1)),
        "unknown": raised(lambda: create(**PROMPT, extra_body={"nobody_s": 1})),
        "model": raised(lambda: create(**{**PROMPT, "model": "other"})),
        "retrieved": raised(lambda: CLIENT.models.retrieve("other")),
        "streamed": raised(lambda: create(**PROMPT, temperature=-1, stream=True)),
        "deadline": raised(lambda: create(**long, extra_headers={"x-request-timeout": "0.05"})),
        "timeout": raised(lambda: CLIENT.with_options(timeout=0.05).completions.create(**long)),
    }


in_modes = {mode: parsed(mode) for mode in ("ar", "verified", "diffusion")}
told = {"parsed": in_modes, "streamed": streamed(), "plain": plain(), "refused": refused()}
told |= {"completions": completions(), "chats": chats(), "asynchronous": asyncio.run(asynchronous())}
told |= {"models": [CLIENT.models.list().data[0].id, CLIENT.models.retrieve("demo").id], "exceptions": exceptions()}
print(json.dumps(told))
