"""The demo's chats as clients get them: its own towers in this process, behind the HTTP face."""

from collections.abc import AsyncGenerator, Set

import httpx
import openai
import pytest

from cluster.config import ServiceConfig
from cluster.faces.http.service import make_app
from cluster.runs.generation import Generation
from cluster.runs.served_model import load_served_model
from cluster.served_paths import checkpoint_directory
from tests.cluster.fakes import ScriptedAttempt, all_modes
from twotower.core import AnyRequest, Mode, Request, ToldEvent
from twotower.engine.in_process import open_pair
from twotower.engine.pair import Pair
from twotower.engine.settings import EngineSettings

QUESTION, ANSWER = "words: 2009", "two thousand and nine"
pytestmark = pytest.mark.slow


class InProcess:
    """One pair as cells."""

    def __init__(self, pair: Pair, fingerprint: str) -> None:
        self._pair, self._fingerprint = pair, fingerprint

    async def served(self) -> Set[Mode]:
        return all_modes()

    def lacks(self, request: AnyRequest) -> bool:
        return False

    def is_to_leave(self, cell: str, request: AnyRequest, fingerprint: str) -> bool:
        return False

    def elsewhere(self, request: AnyRequest, avoid: Set[str]) -> bool:
        return False

    async def place(self, request: AnyRequest, timeout_s: float, avoid: Set[str]) -> ScriptedAttempt:
        return ScriptedAttempt(self._events(request), "pair", self._fingerprint)

    async def _events(self, request: AnyRequest) -> AsyncGenerator[ToldEvent, None]:
        if isinstance(request, Request):
            async for event in self._pair.events(request):
                yield event
        else:
            yield await self._pair.score(request)


async def test_any_chat_client_gets_an_answer() -> None:
    model = load_served_model(ServiceConfig())
    settings = EngineSettings(max_sequences=4, max_sequence_length=256)
    async with open_pair(checkpoint_directory("demo"), settings, device="cpu") as pair:
        app = make_app(Generation(model, InProcess(pair, model.fingerprint)), all_modes)
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app))
        async with openai.AsyncOpenAI(base_url="http://fake/v1", api_key="-", http_client=http) as client:
            ask = client.chat.completions.create
            answer = await ask(model="demo", messages=[{"role": "user", "content": QUESTION}], max_tokens=64)
            assert answer.choices[0].message.content == ANSWER and answer.choices[0].finish_reason == "stop"
            stream = await ask(
                model="demo", messages=[{"role": "user", "content": QUESTION}], max_tokens=64, stream=True
            )
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == ANSWER
            best = await client.completions.create(
                model="demo", prompt=f"{QUESTION}\n", max_tokens=24, n=2, best_of=4, temperature=2, seed=5, logprobs=0
            )
        told = [choice.logprobs.token_logprobs or [] for choice in best.choices if choice.logprobs is not None]
        means = [sum(filter(None, one)) / len(one) for one in told]
        assert len(means) == 2 and means[0] >= means[1]
