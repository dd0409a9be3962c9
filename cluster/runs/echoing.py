"""A prompt echoed before its answer: first the prompt's tokens are scored, then the answer is generated."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from cluster.runs.answer import Piece
from cluster.runs.run import Generating, Scoring
from twotower.core import FinishReason, Likelihood


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """Its tokens, its text, and where each token's text begins in it."""

    token_ids: tuple[int, ...]
    text: str
    offsets: Sequence[int]


class Echoing:
    """Two runs of one request, one after the other. `scoring` is None without likelihoods, or if the prompt is one
    token, which follows nothing. `answer` is run only if the request `answers`.
    """

    def __init__(self, prompt: EchoedPrompt, scoring: Scoring | None, answer: Generating, answers: bool) -> None:
        self.prompt, self.answer = prompt, answer
        self._scoring, self._answers = scoring, answers
        self._scored: tuple[Likelihood, ...] = ()
        self._pieces = self._run()

    @property
    def token_ids(self) -> list[int]:
        return [*self.prompt.token_ids, *self.answer.token_ids]

    @property
    def text(self) -> str:
        return self.prompt.text + self.answer.text

    @property
    def offsets(self) -> list[int]:
        """Where the tokens' text begins."""
        return [*self.prompt.offsets, *(len(self.prompt.text) + offset for offset in self.answer.offsets)]

    @property
    def likelihoods(self) -> list[Likelihood | None]:
        """One for each token, if requested; None for the first token."""
        return [None, *self._scored, *self.answer.likelihoods]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.answer.finish_reason if self._answers else FinishReason.LENGTH

    def __aiter__(self) -> AsyncGenerator[Piece, None]:
        """The answer's pieces."""
        return self._pieces

    async def aclose(self) -> None:
        await self._pieces.aclose()
        await self.answer.aclose()

    async def _run(self) -> AsyncGenerator[Piece, None]:
        if self._scoring is not None:
            self._scored = (await self._scoring.whole()).likelihoods
        if self._answers:
            async for piece in self.answer:
                yield piece
