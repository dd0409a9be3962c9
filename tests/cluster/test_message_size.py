"""The longest request gets from a router to a cell, whatever Serve's own limit was."""

import pickle
from typing import Any

import pytest

from cluster import message_size
from cluster.config import ServiceConfig
from cluster.message_size import BYTES_PER_TOKEN, LIMIT, VARIABLE, check_message_size, largest_message
from cluster.runs.cell_lines import CellLines
from cluster.runs.remote_cells import RemoteCells
from twotower.core import Request, RequestId
from twotower.errors import ConfigError

TOKENS = 4 * 2**20  # as many as a message of max_request_bytes can hold


def test_no_token_is_longer_than_we_say() -> None:
    ids = tuple(range(100_000, 200_000))
    assert len(pickle.dumps(Request(RequestId("r"), ids))) < BYTES_PER_TOKEN * len(ids) + 10_000


def test_a_length_that_serve_would_break_off_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = (LIMIT - largest_message(0)) // BYTES_PER_TOKEN
    check_message_size(ServiceConfig.parse({"model": {"max_sequence_length": longest}}))
    with pytest.raises(ConfigError, match=rf"model.max_sequence_length: got {longest + 1}, .*{VARIABLE}"):
        check_message_size(ServiceConfig.parse({"model": {"max_sequence_length": longest + 1}}))
    monkeypatch.setattr(message_size, "LIMIT", 4 * 2**20)  # where nobody has set the variable
    check_message_size(ServiceConfig())


class CountingCell:
    """Says how long the prompt is that reached it."""

    async def run(self, request: Request, *_: object) -> int:
        return len(request.prompt_token_ids)

    async def ready(self) -> bool:
        return True


@pytest.mark.ray
@pytest.mark.timeout(120)
async def test_the_largest_legal_request_reaches_the_cell(ray_cluster: None) -> None:
    """Of old it was 8 to 20 MB of pickle, where Serve took 4: INTERNAL."""
    from ray import serve

    handle: Any = serve.run(serve.deployment(CountingCell).bind(), name="counting", route_prefix=None)
    try:
        request = Request(RequestId("r"), (100_000,) * TOKENS)
        cells = RemoteCells(handle, CellLines())
        assert await cells._run_on_cell.remote(request, 1.0, None) == TOKENS
    finally:
        serve.shutdown()
