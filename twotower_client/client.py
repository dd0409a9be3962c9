"""A service's blocking client: calls, retries, streams. The faces handle the wire formats."""

import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol, TypeVar, Unpack

from twotower_client.answers import Answer, Event, Finished, Gathering, ModelInfo, Readiness, Score
from twotower_client.asking import (
    Ask,
    Chat,
    Common,
    Message,
    Options,
    Prompt,
    ScoreAsk,
    StreamOptions,
    ask_of,
    checked_ids,
    checked_timeout,
    score_ask_of,
    scores_ask_of,
    text_or_chat,
)
from twotower_client.errors import ServiceError
from twotower_client.retrying import RetryPolicy, Tries
from twotower_client.target import Target, Tls, target_of

Told = TypeVar("Told")
_READY_S = 2.0


class Face(Protocol):
    """One way to a service."""

    def complete(self, ask: Ask, timeout_s: float | None) -> Answer: ...
    def stream(self, ask: Ask, timeout_s: float | None) -> Generator[Event, None, None]: ...
    def score(self, ask: ScoreAsk, timeout_s: float | None) -> tuple[Score, ...]: ...
    def tokenize(
        self, given: str | Chat, add_special_tokens: bool | None, timeout_s: float | None
    ) -> tuple[int, ...]: ...
    def detokenize(self, token_ids: Sequence[int], timeout_s: float | None) -> str: ...
    def model_info(self, timeout_s: float | None) -> ModelInfo: ...
    def readiness(self, timeout_s: float | None) -> Readiness: ...
    def is_alive(self, timeout_s: float | None) -> bool: ...
    def close(self) -> None: ...


def face_of(target: Target) -> Face:
    """httpx2 is not loaded for gRPC, nor gRPC for HTTP."""
    if target.over_grpc:
        from twotower_client.grpc_face import GrpcFace

        return GrpcFace(target)
    from twotower_client.http_face import HttpFace

    return HttpFace(target)


class Client:
    """Asks the service at `url`: grpc://HOST:PORT, grpcs://, http:// or https://. Calls may come from several threads.

    `api_key`: None takes the environment's TWOTOWER_API_KEY. `tls`: files for grpcs and https. `retry`: when a failed
    call is sent again. `timeout_s`: for a call with all its attempts; None leaves the limit to the service.
    `use_proxies`: whether to use the environment's proxies. `face`: another way to the service, for tests. Raises
    ValueError for an invalid setting.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        retry: RetryPolicy | None = None,
        timeout_s: float | None = None,
        use_proxies: bool = False,
        face: Face | None = None,
    ) -> None:
        self.target = target_of(url, api_key, tls, use_proxies)
        self.retry = retry or RetryPolicy()
        self.timeout_s = checked_timeout(timeout_s)
        self._face = face or face_of(self.target)
        self._sleep: Callable[[float], None] = time.sleep
        self._draw = random.uniform

    def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """The whole answer. Raises a ServiceError."""
        ask, timeout_s = ask_of(prompt, options)
        answer, attempts = self._retried(lambda left_s: self._face.complete(ask, left_s), timeout_s)
        return answer.after(attempts)

    def stream(self, prompt: Prompt, **options: Unpack[StreamOptions]) -> "Stream":
        """The answer as it is decoded. A failure before the first event is retried, never one after it."""
        ask, timeout_s = ask_of(prompt, options)
        return Stream(self, ask, timeout_s or self.timeout_s)

    def score(self, prompt: Prompt, continuation: Prompt, **options: Unpack[Common]) -> Score:
        """The continuation's log-probabilities under the context tower. Raises a ServiceError."""
        ask, timeout_s = score_ask_of(prompt, continuation, options)
        return self._retried(lambda left_s: self._face.score(ask, left_s), timeout_s)[0][0]

    def scores(self, prompt: Prompt, continuations: Sequence[Prompt], **options: Unpack[Common]) -> tuple[Score, ...]:
        """The scores of several continuations of one prompt, in order: all text, or all token ids. Each counts as a
        request. Raises a ServiceError.
        """
        ask, timeout_s = scores_ask_of(prompt, continuations, options)
        return self._retried(lambda left_s: self._face.score(ask, left_s), timeout_s)[0]

    def tokenize(
        self,
        text: str | Sequence[Message],
        add_special_tokens: bool | None = None,
        timeout_s: float | None = None,
    ) -> tuple[int, ...]:
        """The token ids of a text or a chat as a prompt. `add_special_tokens` None: for a text only. Raises a
        ServiceError.
        """
        given = text_or_chat(text)
        return self._retried(lambda left_s: self._face.tokenize(given, add_special_tokens, left_s), timeout_s)[0]

    def detokenize(self, token_ids: Sequence[int], timeout_s: float | None = None) -> str:
        """The text of token ids, special tokens written out. Raises a ServiceError."""
        ids = checked_ids(token_ids)
        return self._retried(lambda left_s: self._face.detokenize(ids, left_s), timeout_s)[0]

    def model(self, timeout_s: float | None = None) -> ModelInfo:
        """The served model. Raises a ServiceError."""
        return self._retried(self._face.model_info, timeout_s)[0]

    def is_alive(self, timeout_s: float = _READY_S) -> bool:
        """Whether a router of the service answers. Asked once."""
        try:
            return self._face.is_alive(checked_timeout(timeout_s))
        except ServiceError:
            return False

    def ready(self, timeout_s: float = _READY_S) -> Readiness:
        """Whether the service is ready, and which modes it serves. Asked once; without an answer it is not ready."""
        try:
            return self._face.readiness(checked_timeout(timeout_s))
        except ServiceError as error:
            return Readiness(False, {}, str(error))

    def close(self) -> None:
        self._face.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tries(self, timeout_s: float | None) -> Tries:
        return Tries(self.retry, timeout_s or self.timeout_s, self._draw)

    def _retried(self, call: Callable[[float | None], Told], timeout_s: float | None) -> tuple[Told, int]:
        """The call's final result, and how often it was made."""
        tries = self._tries(checked_timeout(timeout_s))
        while True:
            try:
                return call(tries.begin()), tries.made
            except ServiceError as error:
                pause_s = tries.pause_s(error)
            self._sleep(pause_s)


class Stream(Iterator[Event]):
    """The events of an answer. Leaving the block, or `close`, gives the request up.

    `text` and `token_ids`: so far. `finished`: the end event, once it has arrived. `request_id`: the label in the
    service's log.
    """

    def __init__(self, client: Client, ask: Ask, timeout_s: float | None) -> None:
        self.request_id = ask.request_id
        self._gathering = Gathering(ask.request_id)
        self._events = self._generate(client, ask, timeout_s)

    def _generate(self, client: Client, ask: Ask, timeout_s: float | None) -> Generator[Event, None, None]:
        tries, streamed = client._tries(timeout_s), False
        while True:
            events = client._face.stream(ask, tries.begin())
            self._gathering.attempts = tries.made
            try:
                for event in events:
                    streamed = True
                    self._gathering.add(event)
                    yield event
                return
            except ServiceError as error:
                pause_s = tries.pause_s(error, streamed)
            finally:
                events.close()
            client._sleep(pause_s)

    @property
    def text(self) -> str:
        return self._gathering.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self._gathering.token_ids

    @property
    def finished(self) -> Finished | None:
        return self._gathering.finished

    def rest(self) -> Answer:
        """Reads on to the end: the whole answer. Raises a ServiceError."""
        for _ in self:
            pass
        return self._gathering.answer()

    def close(self) -> None:
        self._events.close()

    def __next__(self) -> Event:
        return next(self._events)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
