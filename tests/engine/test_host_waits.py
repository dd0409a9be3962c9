"""Inside a tick the host waits for the device once: when it reads the unmasked tokens.

A CPU never waits, so these tests look for the operations that would make a GPU's host wait. These read a tensor's
value, or have an output whose size depends on values. Also, every pass must run on a meta device, which has no values.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.dispatch_mode import DispatchMode
from tests.flash_stand_ins import ADAPTERS, FlashStandIns, Load, through
from tests.goldens import CPU, MODELS, Golden, golden
from twotower.core import (
    BlockEvent,
    DecodingParams,
    Event,
    Mode,
    ReleasedEvent,
    Request,
    RequestId,
    ScoreEvent,
    ScoreRequest,
)
from twotower.decoding.bounds import Bounds
from twotower.decoding.likelihoods import beside
from twotower.decoding.sampling import TokenParams, decide, sample
from twotower.decoding.unmasking import Blocks, StepParams, unmask
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.scores import ScoredRow, ScoreSheet, score_rows
from twotower.engine.settings import EngineSettings
from twotower.exchange.local import LocalExchange
from twotower.exchange.protocol import Commit, Prefill
from twotower.expert_formats import ExpertFormat
from twotower.model.cache import Span, TowerCache
from twotower.model.kernels.flash_attention import ByNumber
from twotower.model.quantised import QuantisedExperts
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.planner.released import RELEASED

NAMES = pytest.mark.parametrize("name", MODELS)
WAITING = set(
    "_local_scalar_dense item is_nonzero equal nonzero masked_select bincount _unique _unique2 unique_dim "
    "unique_consecutive repeat_interleave".split()
)
READS = "item tolist cpu numpy nonzero __bool__ __int__ __float__ __index__".split()
# The 30B's shapes with fewer layers: one of each kind.
LARGE = replace(RELEASED, hybrid_override_pattern="ME*")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


class NoWaiting(DispatchMode):
    """Fails at the first operation that would make a GPU's host wait, or that mixes devices."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        assert name not in WAITING, f"{name} makes the host wait"
        assert len({tensor.device for tensor in tensors}) <= 1, f"{name} mixes devices"
        if name.startswith(("index", "_index_put")):
            places = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)]
            assert all(place.dtype is not torch.bool for place in places), f"{name} counts the True"
        return operation(*args, **(kwargs or {}))


def _passes(context: ContextTower, denoiser: DenoiserTower, device: torch.device) -> None:
    """A commit, an AR step, scoring, a denoiser pass over blocks of two sizes, unmasking and sampling."""
    cache = TowerCache(context.config, 4, 64, device, context.dtype)
    slots = [cache.allocate(64) for _ in range(3)]
    for lengths in ([16, 16, 16], [16, 5, 1], [1, 1, 1]):
        tokens = torch.full((3, max(lengths)), 5, device=device)
        hidden = context(tokens, cache.extending(slots, lengths, max(lengths)))
        for slot, length in zip(slots, lengths, strict=True):
            cache.advance(slot, length)
        logits_RV, chosen = context.logits(hidden[:, 0]), [TokenParams(), TokenParams(0.7, 3, 0.9, 1), TokenParams()]
        sample(logits_RV, chosen)
        decided_R3 = decide(logits_RV, chosen)
        beside(decided_R3, logits_RV, decided_R3[:, 0].long(), [0, 2], 5)
        asks = [ScoreRequest(RequestId("s"), (5,) * (length + 1), 1, logprobs=length % 2 or None) for length in lengths]
        sheets = list(map(ScoreSheet, asks))
        score_rows(
            context, hidden, [ScoredRow(row, s, 0, s.positions(0, lengths[row])) for row, s in enumerate(sheets)]
        )
    block = torch.full((3, 16), 3, device=device)
    states = cache.reading(slots, [16, 8, 16], 16)
    logits = denoiser.logits(denoiser(block, states, torch.ones(3, device=device)))
    rows = [StepParams(0.8, 16), StepParams(0.8, 8, 0.7, 1), StepParams(0.0, 1)]
    blocks = Blocks([[3] * 16] * 3, [[True] * 16] * 3, rows)
    unmask(logits, blocks)
    unmask(logits, replace(blocks, rows=rows[::2] + rows[:1]))
    unmask(logits, replace(blocks, rows=[replace(rows[1], bounds=Bounds(3, 0.9, 0.1)), *rows[1:]]))
    cache.delta([Span(slots[0], 0, 17)])


@NAMES
def test_no_pass_makes_the_host_wait(name: str) -> None:
    model = golden(name)
    with NoWaiting():
        _passes(model.context, model.denoiser, CPU)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_nor_does_one_through_flash_attention(adapter: Callable[[Load], ByNumber]) -> None:
    model, stand_ins = golden(MODELS[0]), FlashStandIns(any_dtype=True)
    context, denoiser = (through(adapter(stand_ins.load), tower) for tower in (model.context, model.denoiser))
    with NoWaiting():
        _passes(context, denoiser, CPU)
    assert stand_ins.calls


@pytest.mark.slow
def test_no_pass_needs_a_value_or_a_host_tensor() -> None:
    """On the meta device, at full width: nothing there can be read, so whatever would read it fails."""
    meta = torch.device("meta")
    with meta:
        context, denoiser = ContextTower(LARGE).bfloat16(), DenoiserTower(LARGE).bfloat16()
    with NoWaiting():
        _passes(context, denoiser, meta)


def test_nor_does_one_with_quantised_experts() -> None:
    """Around the product, whose kernel finds the experts' rows on the device, nothing reads a value either."""
    meta, config = torch.device("meta"), LARGE.with_experts(ExpertFormat(4, 32))
    with meta:
        context, denoiser = ContextTower(config).bfloat16(), DenoiserTower(config).bfloat16()
    for module in (*context.modules(), *denoiser.modules()):
        if isinstance(module, QuantisedExperts):
            module.product = lambda x, packed, ends: x.new_empty(x.shape[0], packed.weights.shape[1])
    with NoWaiting():
        _passes(context, denoiser, meta)


def test_the_check_sees_what_it_looks_for() -> None:
    values = torch.arange(4)
    for waiting in (lambda: values.sum().item(), lambda: values[values > 1], lambda: torch.bincount(values)):
        with pytest.raises(AssertionError), NoWaiting():
            waiting()


@contextmanager
def _counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often Python asks a tensor for its values."""
    reads: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        for name in READS:
            original = getattr(torch.Tensor, name)

            def counting(self: Any, *args: Any, _name: str = name, _original: Any = original, **more: Any) -> Any:
                reads[_name] += 1
                return _original(self, *args, **more)

            patch.setattr(torch.Tensor, name, counting)
        yield reads


def _engines(model: Golden, events: list[Event]) -> tuple[ContextEngine, DenoiserEngine]:
    settings = EngineSettings(max_sequences=4, max_sequence_length=128)
    context = ContextEngine(model.context, settings, events.append)
    exchange = LocalExchange(context.cache, lambda: None)
    context.connect(exchange.port)
    return context, DenoiserEngine(model.denoiser, exchange.link, settings, events.append)


@NAMES
@pytest.mark.parametrize("mode", list(Mode))
def test_a_tick_reads_from_the_device_at_most_once(name: str, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    model, events = golden(name), []  # type: ignore[var-annotated]
    context, denoiser = _engines(model, events)
    engines = (context, denoiser)
    params = DecodingParams(mode, max_new_tokens=20, block_size=8, steps_per_block=4, ignore_eos=True)
    owner = context if mode is Mode.AR else denoiser
    for number in range(3):
        owner.add(Request(RequestId(str(number)), tuple(range(4, 12)), params))
    most = 0
    for _ in range(60):
        for engine in engines:
            with _counted(monkeypatch) as reads:
                engine.tick()
            assert sum(reads.values()) <= 1, reads
            most = max(most, sum(reads.values()))
    assert most == 1
    assert sum(len(event.token_ids) for event in events if isinstance(event, BlockEvent)) == 60


@NAMES
@pytest.mark.slow
def test_mixed_widths_and_modes_are_read_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward for each width and one for mock-AR, a single transfer for all of them, and the tokens of each alone."""
    kinds = [(Mode.DIFFUSION, 8), (Mode.DIFFUSION, 32), (Mode.DIFFUSION, 64), (Mode.MOCK_AR, 8)]

    def decode(numbers: range) -> tuple[dict[str, list[int]], int]:
        events: list[Event] = []
        context, denoiser = _engines(golden(name), events)
        for number in numbers:
            mode, block_size = kinds[number % 4]
            params = DecodingParams(mode, max_new_tokens=40, block_size=block_size, steps_per_block=4, ignore_eos=True)
            denoiser.add(Request(RequestId(str(number)), tuple(range(4, 10 + number)), params))
        most = 0
        while sum(isinstance(event, ReleasedEvent) for event in events) < len(numbers):
            context.tick()
            with _counted(monkeypatch) as reads:
                denoiser.tick()
            most = max(most, sum(reads.values()))
        tokens: dict[str, list[int]] = {}
        for event in events:
            if isinstance(event, BlockEvent):
                tokens.setdefault(event.request_id, []).extend(event.token_ids)
        return tokens, most

    together, most = decode(range(4))
    assert most == 1
    alone: dict[str, list[int]] = {}
    for number in range(4):
        alone |= decode(range(number, number + 1))[0]
    assert together == alone and all(len(tokens) == 40 for tokens in alone.values())


@NAMES
def test_an_answer_and_a_score_that_come_of_one_forward_are_read_together(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    settings = EngineSettings(max_sequences=4, max_sequence_length=128)
    context = ContextEngine(golden(name).context, settings, events.append)
    prompt = tuple(range(4, 12))
    context.add(Request(RequestId("ar"), prompt, DecodingParams(Mode.AR, max_new_tokens=1, ignore_eos=True)))
    context.add(ScoreRequest(RequestId("score"), prompt, 2))
    with _counted(monkeypatch) as reads:
        context.tick()
    assert sum(reads.values()) == 1
    assert [type(event) for event in events] == [BlockEvent, ReleasedEvent, ScoreEvent, ReleasedEvent]


@NAMES
def test_a_tick_that_scores_reads_once_and_one_that_only_reads_the_prompt_never(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    settings = EngineSettings(max_sequences=4, max_sequence_length=128, prefill_chunk_tokens=16)
    context = ContextEngine(golden(name).context, settings, events.append)
    context.add(ScoreRequest(RequestId("long"), tuple(range(4, 68)), 40))
    for number in range(2):
        context.add(ScoreRequest(RequestId(str(number)), tuple(range(4, 12)), 2))
    reads_per_tick = []
    while sum(isinstance(event, ScoreEvent) for event in events) < 3:
        with _counted(monkeypatch) as reads:
            context.tick()
        reads_per_tick.append(sum(reads.values()))
    assert reads_per_tick == [0, 1, 0, 1, 1], "long, short ones, long, long, long"


def test_a_chunk_ends_before_the_next_work_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU chunks would otherwise pile up before a commit that comes meanwhile. A stand-in for CUDA's event says
    when the engine waits; a commit that comes during the wait goes before the next chunk."""
    log: list[str] = []
    settings = EngineSettings(max_sequences=4, max_sequence_length=128, prefill_chunk_tokens=16)
    context = ContextEngine(golden(MODELS[0]).context, settings, lambda event: None)
    exchange = LocalExchange(context.cache, lambda: None)
    context.connect(exchange.port)
    exchange.link.submit([Prefill(1, (5, 6), 16)])
    context.tick()
    run = context._passes.run

    class Fence:
        def synchronize(self) -> None:
            log.append("waited")
            if log.count("waited") == 2:
                exchange.link.submit([Commit(1, 2, (7, 8, 9))])

    def logged(slots: Any, tokens: Any, *rest: Any, **named: Any) -> Any:
        log.append("chunk" if len(tokens[0]) == 16 else "commit")
        return run(slots, tokens, *rest, **named)

    monkeypatch.setattr(context._passes, "run", logged)
    monkeypatch.setattr("twotower.engine.context.prompts.fence_on", lambda device: Fence())
    context.add(ScoreRequest(RequestId("long"), tuple(range(4, 53)), 40))
    for _ in range(4):
        context.tick()
    assert log == ["chunk", "waited", "chunk", "waited", "commit", "chunk"]
