"""Passes of both towers over pages read in place, through a stand-in for flash-attn; and whole requests by them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.engine.decode import SETTINGS, decode_all, plain_request
from tests.flash_stand_ins import PAGED, FlashStandIns, Load, in_pages
from tests.goldens import CPU, MODELS, causal_request, diffusion_request, golden
from twotower.core import Mode
from twotower.engine import context_engine, in_process
from twotower.engine.graphs import FixedPasses
from twotower.engine.passes import EagerPasses, Passes, Want
from twotower.model.cache import TowerCache
from twotower.model.kernels.paged_attention import ByTable
from twotower.model.tower import ContextTower, DenoiserTower

Kind = Callable[[ContextTower | DenoiserTower, TowerCache], Passes]
KINDS: dict[str, Kind] = {
    "eager": EagerPasses,
    "fixed": lambda tower, cache: FixedPasses(tower, cache, cache.scratch_slot),
}
PROMPTS = (250, 1, 300)  # the first block crosses into another page
COMMITS = ((16, 16, 16), (5, 16, 3), (1, 1, 1))
BLOCKS = ((16, 16, 16), (16, 8, 1), (1, 1, 1))  # after the prompts and after each commit
DRAFTS, CUTS = (16, 9, 2), (7, 9, 1)
NAMES = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if i else []) for i, n in enumerate(MODELS)]
)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


def _tokens(lengths: Sequence[int]) -> list[list[int]]:
    return [[4 + (7 * row + 3 * place) % 20 for place in range(length)] for row, length in enumerate(lengths)]


def _held(cache: TowerCache, slots: Sequence[int]) -> list[Tensor]:
    """What sequences have read, wherever it lies."""
    places = [cache.flat_positions(slot, 0, cache.length(slot)) for slot in slots]
    keys_values = [part.flatten(1, 2)[:, row] for part in (cache.keys, cache.values) for row in places]
    return [*keys_values, cache.conv[:, slots], cache.ssm[:, slots]]


def _run(
    context: ContextTower, denoiser: DenoiserTower, kind: Kind, page_tokens: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The logits of every pass's real positions, and what the cache holds in the end. No denoiser's pass changes it."""
    cache = TowerCache(context.config, 3, 4 * 400 // page_tokens, CPU, torch.float32, page_tokens=page_tokens)
    reading, denoising = kind(context, cache), kind(denoiser, cache)
    slots = [cache.allocate(length + 60) for length in PROMPTS]
    logits: list[Tensor] = []

    def keep(lengths: Sequence[int], logits_RLV: Tensor) -> None:
        logits.extend(logits_RLV[row, :length].clone() for row, length in enumerate(lengths))

    def look() -> None:
        before = [part.clone() for part in (cache.keys, cache.values, cache.conv, cache.ssm)]
        for block in BLOCKS:
            keep(block, denoising.run(slots, _tokens(block), [0.5] * 3 if max(block) > 1 else None))
        assert all(map(torch.equal, before, (cache.keys, cache.values, cache.conv, cache.ssm)))

    look()  # at rows that have read nothing
    for lengths in (PROMPTS, *COMMITS):
        keep(lengths, reading.run(slots, _tokens(lengths)))
        for slot, length in zip(slots, lengths, strict=True):
            cache.advance(slot, length)
        look()
    hidden_RLD, scans = reading.verify(slots, _tokens(DRAFTS))
    keep(DRAFTS, context.logits(hidden_RLD))
    cache.settle(slots, scans, CUTS)
    look()  # past what was drafted in vain
    reading.run(slots, _tokens(COMMITS[0]), want=Want.STATES)
    for slot, length in zip(slots, COMMITS[0], strict=True):
        cache.advance(slot, length)
    return logits, _held(cache, slots)


@NAMES
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize(
    "paged",
    [pytest.param(p, id=n, marks=[pytest.mark.slow] if n.startswith("torch") else []) for n, p in PAGED.items()],
)
def test_both_towers_give_what_the_plain_path_gives(name: str, kind: Kind, paged: Callable[[Load], ByTable]) -> None:
    model, kernel = golden(name), paged(FlashStandIns(any_dtype=True).load)
    found = _run(in_pages(kernel, model.context), in_pages(kernel, model.denoiser), kind, page_tokens=256)
    wanted = _run(model.context, model.denoiser, EagerPasses, page_tokens=16)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_a_prefix_that_two_sequences_share_is_read_from_the_same_pages() -> None:
    """Both write behind it, each on a page of its own, and a denoiser looks at both: the shared page stays."""
    model = golden(MODELS[0])
    kernel = PAGED["flash_attn"](FlashStandIns(any_dtype=True).load)
    context, denoiser = in_pages(kernel, model.context), in_pages(kernel, model.denoiser)
    cache = TowerCache(context.config, 2, 8, CPU, torch.float32, snapshots=1, page_tokens=256)
    reading, denoising = EagerPasses(context, cache), EagerPasses(denoiser, cache)
    first = cache.allocate(300)
    reading.run([first], _tokens([256]), want=Want.STATES)
    cache.advance(first, 256)
    cache.snapshots.save(first, 0)
    prefix = cache.pages_of(first)[:1]
    second = cache.allocate(300, prefix, snapshot=0)
    shared = cache.keys[:, prefix[0]].clone()
    reading.run([first, second], _tokens([16, 16]), want=Want.STATES)
    for slot in (first, second):
        cache.advance(slot, 16)
    looked = denoising.run([first, second], _tokens([16, 16]), [0.5, 0.5])
    assert torch.equal(cache.keys[:, prefix[0]], shared)
    assert (
        cache.pages_of(first)[0] == cache.pages_of(second)[0] and cache.pages_of(first)[1] != cache.pages_of(second)[1]
    )
    alone = TowerCache(context.config, 1, 32, CPU, torch.float32)
    [slot], plain = [alone.allocate(300)], EagerPasses(model.context, alone)
    for lengths, row in (((256,), 0), ((16, 16), 1)):
        tokens = [_tokens(lengths)[row]]
        plain.run([slot], tokens, want=Want.STATES)
        alone.advance(slot, len(tokens[0]))
    wanted = EagerPasses(model.denoiser, alone).run([slot], [_tokens([16, 16])[1]], [0.5])
    torch.testing.assert_close(looked[1:], wanted, rtol=0, atol=1e-4)


@NAMES
def test_whole_requests_give_the_released_codes_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mode of a prompt, through engines whose caches have a GPU's pages."""
    for module in (context_engine, in_process):
        monkeypatch.setattr(module, "page_tokens_on", lambda kind: 256)
    model = golden(name)
    through = partial(in_pages, PAGED["flash_attn"](FlashStandIns(any_dtype=True).load))
    prompt = model.prompts[0]
    cases = [case for case in prompt["cases"] if case["eos_token_id"] is None][:2]
    causal = (Mode.AR, Mode.MOCK_AR, Mode.VERIFIED)
    requests = [diffusion_request(prompt, case) for case in cases] + [causal_request(prompt, mode) for mode in causal]
    wanted = [case["output"] for case in cases] + [prompt[str(mode)]["tokens"] for mode in causal]
    settings = replace(SETTINGS, capture="off")  # a CPU's programs are made of the plain functions
    results = decode_all(through(model.context), through(model.denoiser), requests, settings=settings)
    assert [result.token_ids for result in results] == wanted


def test_a_kept_prefix_is_read_on_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind one page of a prompt that another request has read, in the same chunks: the same tokens."""
    for module in (context_engine, in_process):
        monkeypatch.setattr(module, "page_tokens_on", lambda kind: 256)
    model, kernel = golden(MODELS[0]), PAGED["flash_attn"](FlashStandIns(any_dtype=True).load)
    towers = in_pages(kernel, model.context), in_pages(kernel, model.denoiser)
    settings = replace(SETTINGS, capture="off", max_sequence_length=512)
    prompts = [[4 + place % 19 for place in range(280)] + [5 + number] * 9 for number in range(3)]
    modes = (Mode.AR, Mode.DIFFUSION, Mode.VERIFIED)
    requests = [plain_request(f"{mode}", mode, prompt=ids) for mode, ids in zip(modes, prompts, strict=True)]
    kept = decode_all(*towers, requests, together=False, settings=settings)
    alone = decode_all(model.context, model.denoiser, requests, settings=replace(settings, prefix_cache_bytes=0))
    assert [result.cached_tokens for result in kept] == [0, 256, 256]
    assert [result.token_ids for result in kept] == [result.token_ids for result in alone]
