"""LangChain's OpenAI classes against a service: `with_langchain.py URL`. Prints what it got as JSON."""

import asyncio
import json
import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

URL = sys.argv[1] + "/v1"
completions = OpenAI(model="demo", base_url=URL, api_key="none", max_tokens=32)
chat = ChatOpenAI(model="demo", base_url=URL, api_key="none", max_completion_tokens=32)
MESSAGES = [SystemMessage("Answer."), HumanMessage("words: 2009")]

answer = chat.invoke(MESSAGES)
print(
    json.dumps(
        {
            "whole": completions.invoke("words: 2009\n"),
            "streamed": "".join(completions.stream("words: 2009\n")),
            "batch": completions.batch(["words: 2009\n", "roman: 3376\n"]),
            "chat": answer.content,
            "usage": answer.usage_metadata["output_tokens"] if answer.usage_metadata else None,
            "chat streamed": "".join(str(part.content) for part in chat.stream(MESSAGES)),
            "chat async": asyncio.run(chat.ainvoke(MESSAGES)).content,
        }
    )
)
