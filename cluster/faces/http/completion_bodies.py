"""The responses of /v1/completions, written."""

import asyncio
from collections.abc import Sequence
from typing import Any

from cluster.faces.http.answer_bodies import AnswerBodies, encoded, spliced
from cluster.faces.http.completion_models import Choice, Completion, CompletionAndUsage, LogProbs
from cluster.faces.http.log_probs import log_probs, whole_log_probs
from cluster.runs.answer import Chunk, Usage
from cluster.runs.echoing import Echoing
from cluster.runs.run import Generating
from twotower.core import FinishReason


class CompletionBodies(AnswerBodies):
    """The bodies of one call."""

    async def whole(self, told: Sequence[Generating | Echoing], usages: Sequence[Usage]) -> bytes:
        choices = []
        for index, run in enumerate(told):
            answer = run.answer if isinstance(run, Echoing) else run
            rated = await whole_log_probs(run, self._names) if self._call.rated else None
            choice = _choice(index, answer, run.text, run.token_ids, run.finish_reason, rated)
            choices.append(encoded({**dict(choice), **self._prompt(answer)}))
            await asyncio.sleep(0)
        return spliced(encoded(self._completion([], usages)), b'"choices":[]', choices)

    def chunk(self, index: int, run: Generating, chunk: Chunk, usages: Sequence[Usage] | None) -> list[object]:
        rated = self._call.rated
        told = log_probs(chunk.token_ids, chunk.likelihoods, chunk.offsets, self._names) if rated else None
        choice = _choice(index, run, chunk.text, chunk.token_ids, chunk.finish_reason, told)
        event = self._completion([choice], usages)
        if chunk.start or not self._call.told_ids:
            return [event]
        return [{**dict(event), "choices": [{**dict(choice), **self._prompt(run)}]}]

    def usage(self, usages: Sequence[Usage]) -> Completion:
        return self._completion([], usages)

    def _completion(self, choices: list[Choice], usages: Sequence[Usage] | None) -> Completion:
        own: dict[str, Any] = {**self._around, "choices": choices}
        return Completion(**own) if usages is None else CompletionAndUsage(**own, usage=self._used(usages))


def _choice(
    index: int,
    run: Generating,
    text: str,
    token_ids: Sequence[int],
    finish_reason: FinishReason | None,
    logprobs: LogProbs | None,
) -> Choice:
    return Choice(
        index=index,
        text=text,
        token_ids=list(token_ids),
        logprobs=logprobs,
        finish_reason=finish_reason,
        seed=run.request.params.seed,
    )
