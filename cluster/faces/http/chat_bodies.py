"""The responses of /v1/chat/completions, written."""

import asyncio
from collections.abc import Sequence
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
    """Of one call."""

    async def whole(self, told: Sequence[Generating | Echoing], usages: Sequence[Usage]) -> bytes:
        choices = []
        for index, run in enumerate(told):
            assert isinstance(run, Generating), "a chat is never echoed"
            choices.append(await self._whole_choice(index, run))
            await asyncio.sleep(0)
        around = ChatCompletion(**self._told, choices=[], usage=self._used(usages))
        return spliced(encoded(around), b'"choices":[]', choices)

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
        if rated is None:
            return encoded(choice)
        parts = []
        for first in range(0, len(run.token_ids), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            listed = encoded(chat_log_probs(run.token_ids[part], run.likelihoods[part], self._names))
            parts.append(listed[1:-1])
            await asyncio.sleep(0)
        return spliced(encoded(choice), b'"content":[]', parts)

    def chunk(self, index: int, run: Generating, chunk: Chunk, usages: Sequence[Usage] | None) -> list[ChatChunk]:
        """Three kinds of events, as OpenAI has them: the role, text, the end."""
        events = []
        if chunk.start == 0:
            events.append(self._event(index, run, {"role": "assistant", "content": ""}, usages))
        rated = None
        if self._call.rated:
            rated = ChatLogProbs(content=chat_log_probs(chunk.token_ids, chunk.likelihoods, self._names))
        if chunk.text or chunk.token_ids:
            events.append(self._event(index, run, {"content": chunk.text}, usages, rated))
        if chunk.finish_reason is not None:
            events.append(self._event(index, run, {}, usages, finish_reason=chunk.finish_reason))
        return events

    def usage(self, usages: Sequence[Usage]) -> ChatChunk:
        return ChatChunkAndUsage(**self._told, choices=[], usage=self._used(usages))

    def _event(
        self,
        index: int,
        run: Generating,
        delta: dict[Any, str],
        usages: Sequence[Usage] | None,
        rated: ChatLogProbs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> ChatChunk:
        seed = run.request.params.seed
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=rated, finish_reason=finish_reason, seed=seed)
        if usages is None:
            return ChatChunk(**self._told, choices=[choice])
        return ChatChunkAndUsage(**self._told, choices=[choice], usage=self._used(usages))

    @property
    def _told(self) -> dict[str, Any]:
        return dict(self._around)
