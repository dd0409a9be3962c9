"""LiteLLM against a service: `with_litellm.py URL`. Prints what it got as JSON."""

import asyncio
import json
import sys
from typing import Any

import litellm

URL = sys.argv[1] + "/v1"
COMPLETIONS: dict[str, Any] = {"model": "text-completion-openai/demo", "api_base": URL, "api_key": "none"}
CHAT: dict[str, Any] = {"model": "openai/demo", "api_base": URL, "api_key": "none"}
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "words: 2009"}]}


def refused() -> str:
    try:
        litellm.completion(**CHAT, **ASKED, temperature=-1)
    except litellm.BadRequestError as error:
        return str(error)
    return "not refused"


async def chat() -> str:
    answer = await litellm.acompletion(**CHAT, **ASKED)
    return str(answer.choices[0].message.content)


whole = litellm.text_completion(**COMPLETIONS, prompt="words: 2009\n", max_tokens=32)
parts = litellm.text_completion(**COMPLETIONS, prompt="words: 2009\n", max_tokens=32, stream=True)
print(
    json.dumps(
        {
            "whole": whole.choices[0].text,
            "tokens": whole.usage.completion_tokens,
            "streamed": "".join(part.choices[0].text or "" for part in parts),
            "chat": litellm.completion(**CHAT, **ASKED).choices[0].message.content,
            "chat streamed": "".join(
                part.choices[0].delta.content or "" for part in litellm.completion(**CHAT, **ASKED, stream=True)
            ),
            "chat async": asyncio.run(chat()),
            "refused": refused(),
        }
    )
)
