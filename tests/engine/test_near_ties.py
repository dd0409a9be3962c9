"""The smallest margin of a request's decisions comes with its last event; near-ties are counted."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from tests.engine.decode import SETTINGS, decode_all
from tests.goldens import causal_request, diffusion_request, vendored
from twotower.core import BlockEvent, DecodingParams, Event, Mode, Request, RequestId
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.modes.block_steps import StepTrace
from twotower.exchange.local import LocalExchange
from twotower.testing import ScriptedContextTower, ScriptedDenoiserTower


def test_a_requests_margin_is_its_steps_smallest() -> None:
    model = vendored("tt_moe")
    prompt = model.prompts[0]
    requests = [diffusion_request(prompt, case) for case in prompt["cases"] if case["eos_token_id"] is None]
    requests += [causal_request(prompt, mode) for mode in (Mode.AR, Mode.MOCK_AR)]
    traces: list[StepTrace] = []
    results = decode_all(model.context, model.denoiser, requests, traces=traces)
    for request, result in zip(requests, results, strict=True):
        steps = [step.margin for step in traces if step.request_id == request.id]
        assert result.margin is not None and 0 < result.margin < 1
        assert not steps or result.margin == pytest.approx(min(steps), abs=1e-9)


def _run(request: Request, logits: Callable[..., torch.Tensor] | None) -> tuple[list[BlockEvent], list[int]]:
    """Events of one request through scripted towers, and both engines' count of near-ties."""
    towers: list[Any] = [ScriptedContextTower(), ScriptedDenoiserTower()]
    if logits is not None:
        for tower in towers:
            tower.logits = logits
    events: list[Event] = []
    context = ContextEngine(cast(Any, towers[0]), SETTINGS, events.append)
    exchange = LocalExchange(context.cache, lambda: None)
    context.connect(exchange.port)
    denoiser = DenoiserEngine(cast(Any, towers[1]), exchange.link, SETTINGS, events.append)
    (context if request.params.mode is Mode.AR else denoiser).add(request)
    with torch.inference_mode():
        for _ in range(100):
            denoiser.tick(), context.tick()
    return [e for e in events if isinstance(e, BlockEvent)], [e.stats(0.0).near_ties for e in (context, denoiser)]


@pytest.mark.parametrize("mode", list(Mode))
def test_only_the_last_event_tells_the_margin(mode: Mode) -> None:
    params = DecodingParams(mode, max_new_tokens=12, block_size=4, confidence_threshold=0.0, ignore_eos=True)
    *first, last = _run(Request(RequestId("r"), (5, 6), params), None)[0]
    assert first and all(event.margin is None for event in first)
    assert last.finish_reason is not None and last.margin is not None and last.margin > 1e-3


@pytest.mark.parametrize(("mode", "decisions"), [(Mode.DIFFUSION, 12), (Mode.MOCK_AR, 12), (Mode.AR, 12)])
def test_ties_are_counted(mode: Mode, decisions: int) -> None:
    """Where all tokens are alike, every step and every token is a near-tie."""
    alike = lambda hidden: torch.zeros(*hidden.shape[:-1], 32)  # noqa: E731
    params = DecodingParams(mode, max_new_tokens=12, block_size=4, confidence_threshold=1.0, ignore_eos=True)
    events, (context, denoiser) = _run(Request(RequestId("r"), (5, 6), params), alike)
    assert events[-1].margin == 0.0
    assert (context, denoiser) == ((decisions, 0) if mode is Mode.AR else (0, decisions))
