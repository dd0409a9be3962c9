"""Errors as exceptions, and when a call is sent again: over both faces, blocking and with asyncio."""

import pickle
import socket
from collections.abc import Callable

import pytest

from tests.client.conftest import PROMPT_RETRIES, Asking
from tests.cluster.fakes import ScriptedCells
from tests.cluster.test_http import TEXT
from twotower import errors as service
from twotower.core import AnyRequest
from twotower_client import (
    AsyncClient,
    Block,
    Cancelled,
    Client,
    DeadlineExceeded,
    Event,
    InternalError,
    InvalidRequest,
    NumericalError,
    Overloaded,
    Unavailable,
)

RESUMES = 3  # by the service, before the client hears of it
KINDS = [
    (service.Overloaded("full", 7.0), Overloaded, "RESOURCE_EXHAUSTED", 429, 7.0),
    (service.Unavailable("gone"), Unavailable, "UNAVAILABLE", 503, 5.0),
    (service.DeadlineExceeded("late"), DeadlineExceeded, "DEADLINE_EXCEEDED", 504, None),
    (service.Cancelled("left"), Cancelled, "CANCELLED", 499, None),
    (service.NumericalError("NaN"), NumericalError, "ABORTED", 500, None),
    (RuntimeError("a secret"), InternalError, "INTERNAL", 500, None),
]


def failing(error: Exception, times: int = 10**9, at_block: int = 0) -> Callable[[AnyRequest, int], None]:
    left = [times]

    def fail(request: AnyRequest, block: int) -> None:
        if block == at_block and left[0]:
            left[0] -= 1
            raise error

    return fail


async def test_each_error_has_its_exception(asking: Asking, cells: ScriptedCells) -> None:
    for raised, kind, code, status, hint_s in KINDS:
        cells.fail = failing(raised)
        with pytest.raises(kind) as caught:
            await asking.complete("Hi", request_id="r-1")
        error = caught.value
        assert type(error) is kind
        assert (error.code, error.request_id, error.retry_after_s) == (code, "r-1", hint_s)
        assert error.status == (None if asking.client.target.over_grpc else status)
        assert error.attempts == (3 if error.can_retry else 1) and "secret" not in str(error)
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind and again.details == error.details and str(again) == str(error)


async def test_the_fields_at_fault(asking: Asking) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await asking.complete("Hi", top_p=7.0, request_id="r-2")
    [violation] = caught.value.violations
    assert "top_p" in violation.field and "got 7" in violation.description
    assert caught.value.attempts == 1 and caught.value.request_id == "r-2"


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("raised", "an_attempt", "pauses"),
    [
        (service.Unavailable("gone"), 1 + RESUMES, [5.25, 5.5]),
        (service.Overloaded("full", 2.0), 1, [2.25, 2.5]),
    ],
)
async def test_it_comes_again_when_it_is_told_to(
    asking: Asking, cells: ScriptedCells, raised: Exception, an_attempt: int, pauses: list[float], streams: bool
) -> None:
    """The hint and, on top, the longest random pause, which doubles; under one label."""
    cells.fail = failing(raised, times=2 * an_attempt)
    if streams:
        _, stream = await asking.stream("Hi", request_id="r-3")
        told = stream.rest() if asking.blocks else await stream.rest()
    else:
        told = await asking.complete("Hi", request_id="r-3")
    assert told.text == TEXT and told.attempts == 3 and told.request_id == "r-3"
    assert asking.pauses == pauses and len(asked(cells)) == 3


async def test_what_has_streamed_is_never_asked_again(asking: Asking, cells: ScriptedCells) -> None:
    """An error in the middle leaves what has come."""
    for error, kind in ((service.NumericalError("NaN"), NumericalError), (service.Unavailable("gone"), Unavailable)):
        cells.fail = failing(error, at_block=2)
        stream, events = asking.client.stream("Hi"), list[Event]()
        with pytest.raises(kind) as caught:
            await asking.read(stream, events)
        assert [type(event) for event in events] == [Block, Block] and stream.text == TEXT[:8]
        assert caught.value.attempts == 1 and not asking.pauses and stream.finished is None
    assert len(asked(cells)) == 2


def asked(cells: ScriptedCells) -> set[str]:
    """The service's ids of the requests, whichever cells they went on on."""
    return {request.id.partition("~")[0] for request in cells.requests}


async def test_no_pause_goes_beyond_the_deadline(asking: Asking, cells: ScriptedCells) -> None:
    cells.fail = failing(service.Overloaded("full", 7.0))
    with pytest.raises(Overloaded) as caught:
        await asking.complete("Hi", timeout_s=6.0)
    assert caught.value.attempts == 1 and not asking.pauses


async def test_a_hint_that_is_too_long_is_told(asking: Asking, cells: ScriptedCells) -> None:
    cells.fail = failing(service.Overloaded("full", 61.0))
    with pytest.raises(Overloaded) as caught:
        await asking.complete("Hi")
    assert caught.value.retry_after_s == 61.0 and not asking.pauses


async def test_the_deadline_is_the_services_too(asking: Asking, cells: ScriptedCells) -> None:
    await asking.complete("Hi", timeout_s=45.0)
    assert 40 < cells.timeouts[0] < 46  # over gRPC the wire rounds it up
    cells.pace_s = 30.0
    with pytest.raises(DeadlineExceeded):
        await asking.complete("Hi", timeout_s=0.1)
    with pytest.raises(DeadlineExceeded):
        await asking.stream("Hi", timeout_s=0.1)


async def test_a_score_is_retried_too(asking: Asking, cells: ScriptedCells) -> None:
    cells.fail = failing(service.Overloaded("full", 1.0), times=1)
    assert (await asking.score("Hi", "a")).token_ids and asking.pauses == [1.25]


@pytest.mark.slow
async def test_nobody_answers() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for kind in (Client, AsyncClient):
            for scheme in ("grpc", "http"):
                asking = Asking(kind(f"{scheme}://127.0.0.1:{port}", retry=PROMPT_RETRIES))
                with pytest.raises(Unavailable) as caught:
                    await asking.complete("Hi")
                assert caught.value.attempts == 3 and asking.pauses == [0.25, 0.5]
                ready = await asking.ready()
                assert not ready.ready and "onnect" in ready.reason and not await asking.is_alive()
                await asking.close()
