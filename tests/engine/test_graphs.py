"""Captured passes give what the ordinary ones give and touch nothing but their rows. No GPU: graphs run eagerly."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.goldens import CPU, MODELS, Golden, golden
from twotower.engine.graphs import FixedPasses
from twotower.engine.passes import EagerPasses, Passes
from twotower.engine.recorded import RecordedPasses
from twotower.model.cache import Span, TowerCache
from twotower.model.tower import ContextTower, DenoiserTower

Kind = Callable[[ContextTower | DenoiserTower, TowerCache, int], Passes]
KINDS: dict[str, Kind] = {
    "fixed": FixedPasses,
    "recorded": lambda tower, cache, scratch: RecordedPasses(tower, cache, often=1),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
NAMES = pytest.mark.parametrize("name", MODELS)
LENGTHS = (21, 1, 64)  # read before, by rows that share a pass


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


def _filled(model: Golden) -> tuple[TowerCache, list[int], int]:
    """A cache whose slots have read LENGTHS tokens, those slots, and a scratch slot."""
    cache = TowerCache(model.checkpoint.config, 5, 40, CPU, torch.float32)
    scratch = cache.allocate(0)
    slots = [cache.allocate(length + 32) for length in LENGTHS]
    for slot, length in zip(slots, LENGTHS, strict=True):
        _read(model, cache, [slot], [list(range(4, 4 + length))])
    return cache, slots, scratch


def _read(model: Golden, cache: TowerCache, slots: list[int], tokens: list[list[int]]) -> torch.Tensor:
    width = max(map(len, tokens))
    states = cache.extending(slots, [len(ids) for ids in tokens], width)
    hidden = model.context(torch.tensor([ids + [0] * (width - len(ids)) for ids in tokens]), states)
    for slot, ids in zip(slots, tokens, strict=True):
        cache.advance(slot, len(ids))
    return model.context.logits(hidden)


@NAMES
@kinds
@pytest.mark.parametrize("lengths", [(16, 16, 16), (1, 1, 1), (5, 16, 3)])
@pytest.mark.slow
def test_extending(name: str, kind: Kind, lengths: tuple[int, ...]) -> None:
    model = golden(name)
    (ours, slots, scratch), (plain, _, _) = _filled(model), _filled(model)
    tokens = [[5 + i for i in range(length)] for length in lengths]
    logits = kind(model.context, ours, scratch).run(slots, tokens)
    wanted = _read(model, plain, slots, tokens)
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        ours.advance(slot, length)
        torch.testing.assert_close(logits[row, :length], wanted[row, :length], rtol=0, atol=1e-4)
        for ours_part, plain_part in zip(
            ours.delta([Span(slot, 0, ours.length(slot))]),
            plain.delta([Span(slot, 0, plain.length(slot))]),
            strict=True,
        ):
            torch.testing.assert_close(ours_part, plain_part, rtol=0, atol=1e-4)


@NAMES
@kinds
@pytest.mark.parametrize("t", [(1.0, 0.5, 0.25), None])
def test_reading(name: str, kind: Kind, t: tuple[float, ...] | None) -> None:
    model = golden(name)
    cache, slots, scratch = _filled(model)
    before = [part.clone() for part in (cache.conv, cache.ssm, cache.keys, cache.values)]
    tokens = [[3] * 16, [3] * 8, [3] * 16] if t else [[7], [8], [9]]
    width = len(tokens[0])
    logits = kind(model.denoiser, cache, scratch).run(slots, tokens, t)
    states = cache.reading(slots, [len(ids) for ids in tokens], width)
    padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in tokens])
    wanted = model.denoiser.logits(model.denoiser(padded, states, None if t is None else torch.tensor(t)))
    for row, ids in enumerate(tokens):
        torch.testing.assert_close(logits[row, : len(ids)], wanted[row, : len(ids)], rtol=0, atol=1e-4)
    for part, unchanged in zip((cache.conv, cache.ssm, cache.keys, cache.values), before, strict=True):
        assert torch.equal(part, unchanged)


def test_few_shapes_serve_many_batches() -> None:
    model = golden(MODELS[0])
    cache, slots, scratch = _filled(model)
    passes = FixedPasses(model.denoiser, cache, scratch)
    for rows in (1, 2, 3):
        passes.run(slots[:rows], [[3] * 16] * rows, [1.0] * rows)
    assert sorted(shape.rows for shape in passes._passes) == [1, 2, 4]


def test_wide_rows_are_not_captured_and_all_outputs_share_their_memory() -> None:
    model = golden(MODELS[0])
    cache, slots, scratch = _filled(model)
    passes = FixedPasses(model.denoiser, cache, scratch)
    four = passes.run(slots, [[3] * 16] * 3, [1.0] * 3)
    one = passes.run(slots[:1], [[3] * 16], [1.0])
    assert one.untyped_storage().data_ptr() == four.untyped_storage().data_ptr()
    known = len(passes._passes)
    wide = passes.run(slots[:1], [[3] * 17], [1.0])
    assert wide.shape[1] == 17 and len(passes._passes) == known


@NAMES
@kinds
@pytest.mark.parametrize("lengths", [(16, 16, 16), (5, 16, 3), (1, 1, 1)])
@pytest.mark.slow
def test_verifying(name: str, kind: Kind, lengths: tuple[int, ...]) -> None:
    """Hidden states, scans that move the states on as an eager pass's do, and no state changed before that."""
    model = golden(name)
    (ours, slots, scratch), (plain, _, _) = _filled(model), _filled(model)
    tokens, cuts = [[5 + i for i in range(length)] for length in lengths], [min(length, 3) for length in lengths]
    passes, before = kind(model.context, ours, scratch), (ours.conv.clone(), ours.ssm.clone())
    for _ in range(2):  # the second time in memory that has been used
        hidden, scans = passes.verify(slots, tokens)
        assert torch.equal(ours.conv, before[0]) and torch.equal(ours.ssm, before[1])
    wanted, plain_scans = EagerPasses(model.context, plain).verify(slots, tokens)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(hidden[row, :length], wanted[row, :length], rtol=0, atol=1e-4)
    ours.settle(slots, scans, cuts)
    plain.settle(slots, plain_scans, cuts)
    for slot in slots:
        assert ours.length(slot) == plain.length(slot)
        span = [Span(slot, 0, ours.length(slot))]
        for part, plain_part in zip(ours.delta(span), plain.delta(span), strict=True):
            torch.testing.assert_close(part, plain_part, rtol=0, atol=1e-4)


def test_all_drafts_leave_their_scans_in_the_same_memory() -> None:
    model = golden(MODELS[0])
    cache, slots, scratch = _filled(model)
    passes = FixedPasses(model.context, cache, scratch)
    _, most = passes.verify(slots, [[5] * 16] * 3)
    _, least = passes.verify(slots[:1], [[5] * 2])
    assert most is not None and least is not None
    assert [part.shape[1] for part in (*most, *least)] == [3] * 4 + [1] * 4
    assert [part.data_ptr() for part in most] == [part.data_ptr() for part in least]
    _, wide = passes.verify(slots[:1], [[5] * 17])
    assert wide is not None and wide.decay.data_ptr() != most.decay.data_ptr(), "of no usual width: eager"
