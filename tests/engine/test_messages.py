"""How often an engine speaks to its link: once for all that opens together, then once a tick, twice with mock-AR."""

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from twotower.core import DecodingParams, Event, FailureEvent, Mode, ReleasedEvent, Request, RequestId
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.settings import EngineSettings
from twotower.errors import Overloaded
from twotower.exchange.local import LocalExchange
from twotower.exchange.protocol import Command, Prefill
from twotower.testing import ScriptedContextTower, ScriptedDenoiserTower

SETTINGS = EngineSettings(max_sequences=16, max_sequence_length=128, capture="off")


@pytest.mark.parametrize(("modes", "most"), [((Mode.DIFFUSION,), 1), ((Mode.DIFFUSION, Mode.MOCK_AR), 2)])
def test_one_message_a_tick(modes: Sequence[Mode], most: int) -> None:
    events: list[Event] = []
    context = ContextEngine(cast(Any, ScriptedContextTower()), SETTINGS, events.append)
    exchange = LocalExchange(context.cache, lambda: None)
    context.connect(exchange.port)
    denoiser = DenoiserEngine(cast(Any, ScriptedDenoiserTower()), exchange.link, SETTINGS, events.append)
    sent: list[Sequence[Command]] = []
    submit = exchange.link.submit

    def counting(commands: Sequence[Command], reading: bool = False) -> None:
        if commands:
            sent.append(list(commands))
        submit(commands, reading)

    exchange.link.submit = counting  # type: ignore[method-assign]
    for number in range(12):
        params = DecodingParams(modes[number % len(modes)], max_new_tokens=20 + number, block_size=4 + number % 3)
        denoiser.add(Request(RequestId(str(number)), (5, 6, 7 + number), params))
    sizes, busiest = [], 0
    with torch.inference_mode():
        while sum(isinstance(event, ReleasedEvent) for event in events) < 12:
            context.tick()
            denoiser.tick()
            of_this_tick = [commands for commands in sent if not isinstance(commands[0], Prefill)]
            sent.clear()
            busiest = max(busiest, len(of_this_tick))
            sizes += map(len, of_this_tick)
    assert busiest == most and max(sizes) > 1


@pytest.mark.parametrize("room", [4, 2])
def test_openings_that_come_together_are_one_message(room: int) -> None:
    """Where the link has no room for all of them, each is opened on its own, and those without room fail."""
    events: list[Event] = []
    context = ContextEngine(cast(Any, ScriptedContextTower()), SETTINGS, events.append)
    link = LocalExchange(context.cache, lambda: None).link
    denoiser = DenoiserEngine(cast(Any, ScriptedDenoiserTower()), link, SETTINGS, events.append)
    opened: list[list[int]] = []

    def submit(commands: Sequence[Command], reading: bool = False) -> None:
        openings = [command.sequence for command in commands if isinstance(command, Prefill)]
        if sum(map(len, opened)) + len(openings) > room:
            raise Overloaded("no mirror slot is free")
        if openings:
            opened.append(openings)

    link.submit = submit  # type: ignore[method-assign]
    for number in range(3):
        denoiser.add(Request(RequestId(str(number)), (5, 6), DecodingParams()))
    with torch.inference_mode():
        denoiser.tick()
    assert list(map(len, opened)) == ([3] if room == 4 else [1, 1])
    assert len({sequence for openings in opened for sequence in openings}) == min(room, 3)
    failed = [event.request_id for event in events if isinstance(event, FailureEvent)]
    assert failed == ([] if room == 4 else ["2"])
    assert denoiser.stats(0.0).sequences == min(room, 3)
