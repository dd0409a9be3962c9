"""Tokens that nobody has fetched yet leave a runner joined, in the causal modes only."""

import pytest

from twotower.core import (
    AnyRequest,
    BlockEvent,
    DecodingParams,
    FailureEvent,
    FinishReason,
    Mode,
    ReleasedEvent,
    Request,
    RequestId,
)
from twotower.engine.handle import EngineStats
from twotower.engine.runner import EngineRunner
from twotower.errors import Cancelled


class Idle:
    """An engine that never does anything."""

    def takes(self, request: AnyRequest) -> bool:
        return True

    def add(self, request: AnyRequest) -> None:
        pass

    def cancel(self, request_id: RequestId) -> None:
        pass

    def tick(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def stats(self, busy_s: float) -> EngineStats:
        raise NotImplementedError


def _runner(*modes: Mode) -> EngineRunner:
    """It takes a request of each mode, named after it, and is not started: the test emits."""
    runner = EngineRunner()
    runner.engines = [Idle()]
    runner.add([Request(RequestId(mode), (5,), DecodingParams(mode)) for mode in modes])
    return runner


def _token(mode: Mode, start: int, reason: FinishReason | None = None, margin: float | None = None) -> BlockEvent:
    return BlockEvent(RequestId(mode), start, (10 + start,), 1, 1, reason, margin)


@pytest.mark.parametrize("mode", [Mode.AR, Mode.MOCK_AR])
async def test_tokens_are_joined_until_they_are_fetched(mode: Mode) -> None:
    runner = _runner(mode, Mode.DIFFUSION)
    for start in range(2):
        runner.emit(_token(mode, start))
        runner.emit(_token(Mode.DIFFUSION, start))
    blocks = [_token(Mode.DIFFUSION, start) for start in range(2)]
    assert await runner.events() == [BlockEvent(RequestId(mode), 0, (10, 11), 2, 2), *blocks]
    runner.emit(_token(mode, 2))
    runner.emit(_token(mode, 3, FinishReason.LENGTH, 0.5))
    runner.emit(ReleasedEvent(RequestId(mode)))
    last = BlockEvent(RequestId(mode), 2, (12, 13), 2, 2, FinishReason.LENGTH, 0.5)
    assert await runner.events() == [last, ReleasedEvent(RequestId(mode))]
    assert not runner._joining


async def test_a_failure_stays_behind_the_tokens_before_it() -> None:
    runner = _runner(Mode.AR)
    error = Cancelled("given up")
    events = [_token(Mode.AR, 0), _token(Mode.AR, 1), FailureEvent(RequestId(Mode.AR), error)]
    for event in [*events, ReleasedEvent(RequestId(Mode.AR))]:
        runner.emit(event)
    got = await runner.events()
    assert [type(event) for event in got] == [BlockEvent, FailureEvent, ReleasedEvent]
    assert isinstance(got[0], BlockEvent) and got[0].token_ids == (10, 11)
