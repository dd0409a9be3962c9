"""The common part of the responses of completions and chats, and their encoding."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pydantic import BaseModel
from pydantic_core import to_json

from cluster.faces.error_codes import Failure
from cluster.faces.error_shape import error_shape
from cluster.faces.http.answer_call import AnswerCall
from cluster.faces.http.completion_models import PromptTokensDetails
from cluster.faces.http.completion_models import Usage as UsageBody
from cluster.runs.answer import Chunk, Usage
from cluster.runs.echoing import Echoing
from cluster.runs.run import Generating
from twotower.core import COSTS, Mode, StepEvent, TraceEvent
from twotower.text.token_names import TokenNames
from twotower.text.token_texts import TokenTexts


class AnswerBodies(ABC):
    """The responses to one call. `usages`: of all its runs so far; runs of one prompt are adjacent."""

    def __init__(self, call: AnswerCall, model: str, created: int, mode: Mode, names: TokenNames) -> None:
        self._call, self._mode, self._names = call, mode, names
        self._around = {"id": call.id, "request_id": call.shown_id, "created": created, "model": model}

    @abstractmethod
    async def whole(self, told: Sequence[Generating | Echoing], usages: Sequence[Usage]) -> bytes:
        """The response of a call without a stream. It may be very long, so the loop runs other tasks meanwhile."""

    def opening(self, index: int, run: Generating, usages: Sequence[Usage] | None) -> Sequence[object]:
        """The first events of an answer's stream."""
        return ()

    @abstractmethod
    def chunk(self, index: int, run: Generating, chunk: Chunk, usages: Sequence[Usage] | None) -> Sequence[object]:
        """The events of a chunk; `usages`: if every event has them."""

    @abstractmethod
    def usage(self, usages: Sequence[Usage]) -> BaseModel:
        """The event before [DONE], if stream_options.include_usage asks for it."""

    def trace(self, index: int, event: TraceEvent, texts: TokenTexts) -> dict[str, object]:
        """A `twotower.trace` event, without choices, because OpenAI's SDKs read any event as a completion."""
        about = {"id": self._call.id, "request_id": self._call.shown_id, "object": "twotower.trace", "choices": []}
        return {**about, "index": index, **_traced(event, texts)}

    def _prompt(self, run: Generating) -> dict[str, object]:
        """The prompt's ids, if requested."""
        return {"prompt_token_ids": run.request.prompt_token_ids} if self._call.told_ids else {}

    def _used(self, usages: Sequence[Usage]) -> UsageBody:
        """A prompt counts once, with any number of answers."""
        firsts = usages[:: self._call.tries]
        prompt, cached = (sum(getattr(usage, name) for usage in firsts) for name in ("prompt_tokens", "cached_tokens"))
        completion = sum(usage.completion_tokens for usage in usages)
        costs = {name: sum(getattr(usage, name) for usage in usages) for name in COSTS}
        return UsageBody(
            prompt_tokens=prompt,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            completion_tokens=completion,
            total_tokens=prompt + completion,
            **costs,
            tokens_per_step=completion / costs["num_steps"] if costs["num_steps"] else None,
            mode=self._mode,
        )


def _traced(event: TraceEvent, texts: TokenTexts) -> dict[str, object]:
    if isinstance(event, StepEvent):
        step = {"start": event.start, "size": event.size, "step": event.step, "positions": event.positions}
        tokens = {"token_ids": event.token_ids, "texts": texts.of(event.token_ids), "confidence": event.confidence}
        return {"step": {**step, **tokens}}
    draft = {"start": event.start, "draft": event.draft, "draft_texts": texts.of(event.draft)}
    written = {"token_id": event.token_id, "text": "".join(texts.of([event.token_id]))}
    return {"round": {**draft, "num_accepted": event.num_accepted, **written}}


def encoded(body: object) -> bytes:
    """JSON in UTF-8 without spaces."""
    return to_json(body)


def spliced(around: bytes, empty: bytes, items: Sequence[bytes]) -> bytes:
    """JSON with these items in the list of this name, which is `empty` and not within a string."""
    before, after = around.split(empty, 1)
    return b"".join([before, empty[:-1], b",".join(items), b"]", after])


def error_body(failure: Failure) -> dict[str, object]:
    """`param` is the first wrong field."""
    param = failure.problems[0].field if failure.problems else None
    return error_shape(failure.message, failure.code.type, param, failure.code.code)
