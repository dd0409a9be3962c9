"""The responses of /v1/chat/completions, written."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from cluster.faces.http.answer_bodies import AnswerBodies, encoded, spliced
from cluster.faces.http.chat_log_probs import AT_ONCE, chat_log_probs
from cluster.faces.http.chat_models import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkAndUsage,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogProbs,
)
from cluster.runs.answer import Chunk, Usage
from cluster.runs.echoing import Echoing
from cluster.runs.run import Generating
from twotower.core import FinishReason


class ChatBodies(AnswerBodies):
    """The bodies of one call."""

    async def whole(self, told: Sequence[Generating | Echoing], usages: Sequence[Usage]) -> bytes:
        choices = []
        for index, run in enumerate(told):
            assert isinstance(run, Generating), "a chat is never echoed"
            choices.append(await self._whole_choice(index, run))
            await asyncio.sleep(0)
        around = ChatCompletion(**self._told, choices=[], usage=self._used(usages))
        first, *_ = told
        assert isinstance(first, Generating)
        return spliced(encoded({**dict(around), **self._prompt(first)}), b'"choices":[]', choices)

    async def _whole_choice(self, index: int, run: Generating) -> bytes:
        assert run.finish_reason is not None
        rated = ChatLogProbs(content=[]) if self._call.rated else None
        choice = ChatChoice(
            index=index,
            message=AnswerMessage(content=run.text),
            logprobs=rated,
            finish_reason=run.finish_reason,
            seed=run.request.params.seed,
        )
        shown = {**dict(choice), **self._ids(run.token_ids)}
        if rated is None:
            return encoded(shown)
        parts = []
        for first in range(0, len(run.token_ids), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            listed = encoded(chat_log_probs(run.token_ids[part], run.likelihoods[part], self._names))
            parts.append(listed[1:-1])
            await asyncio.sleep(0)
        return spliced(encoded(shown), b'"content":[]', parts)

    def opening(self, index: int, run: Generating, usages: Sequence[Usage] | None) -> list[object]:
        """The role."""
        return [{**self._event(index, run, usages, {"role": "assistant", "content": ""}), **self._prompt(run)}]

    def chunk(self, index: int, run: Generating, chunk: Chunk, usages: Sequence[Usage] | None) -> list[object]:
        """Text and the end, as OpenAI has them, each an event."""
        events = list[object]()
        event = partial(self._event, index, run, usages)
        rated = None
        if self._call.rated:
            rated = ChatLogProbs(content=chat_log_probs(chunk.token_ids, chunk.likelihoods, self._names))
        if chunk.text or chunk.token_ids:
            events.append(event({"content": chunk.text}, rated, token_ids=chunk.token_ids))
        if chunk.finish_reason is not None:
            events.append(event({}, finish_reason=chunk.finish_reason))
        return events

    def usage(self, usages: Sequence[Usage]) -> ChatChunk:
        return ChatChunkAndUsage(**self._told, choices=[], usage=self._used(usages))

    def _event(
        self,
        index: int,
        run: Generating,
        usages: Sequence[Usage] | None,
        delta: dict[Any, str],
        rated: ChatLogProbs | None = None,
        finish_reason: FinishReason | None = None,
        token_ids: Sequence[int] = (),
    ) -> dict[str, object]:
        seed = run.request.params.seed
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=rated, finish_reason=finish_reason, seed=seed)
        told = {"usage": self._used(usages)} if usages is not None else {}
        return {
            **dict(ChatChunk(**self._told, choices=[])),
            "choices": [{**dict(choice), **self._ids(token_ids)}],
            **told,
        }

    def _ids(self, token_ids: Sequence[int]) -> dict[str, object]:
        """The answer's token ids, if the request asks for them."""
        return {"token_ids": token_ids} if self._call.told_ids else {}

    @property
    def _told(self) -> dict[str, Any]:
        return dict(self._around)
