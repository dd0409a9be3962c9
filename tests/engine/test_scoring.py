"""Scores are the context tower's own log-probabilities, whatever is read beside them, and leave nothing behind."""

import asyncio
import copy
import random
import time
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.engine.arrangements import Towers, split_pair
from tests.engine.decode import SETTINGS, collect
from tests.goldens import CPU, MODELS, causal_request, diffusion_request, golden, prompt_ids, vendored
from twotower.core import Event, FailureEvent, Mode, ReleasedEvent, ScoreEvent, ScoreRequest
from twotower.core import RequestId as Id
from twotower.decoding.margins import NEAR_TIE
from twotower.engine import scores
from twotower.engine.context_engine import ContextEngine
from twotower.engine.in_process import pair_of
from twotower.engine.pair import Pair
from twotower.engine.settings import EngineSettings
from twotower.errors import DeadlineExceeded, NumericalError
from twotower.model.cache import TowerCache
from twotower.model.tower import ContextTower

PROMPTS = pytest.mark.parametrize(("name", "number"), prompt_ids())
NAMES = pytest.mark.parametrize("name", MODELS)
LOGITS = 1e-3  # the vectors' own tolerance
NOISE = 1e-4  # of the same pass cut or batched in another way; 1e-5 as a rule


def _texts(vocab: int, count: int, seed: int = 0, longest: int = 180) -> list[ScoreRequest]:
    draw = random.Random(seed)
    requests = []
    for number in range(count):
        length = draw.randint(2, longest)
        tokens = tuple(draw.randrange(4, vocab) for _ in range(length))
        requests.append(ScoreRequest(Id(f"text {number}"), tokens, draw.randrange(1, length)))
    return requests


def _direct(tower: ContextTower, tokens: Sequence[int]) -> Tensor:
    """Log-probabilities [L,V] of what follows each position: one forward over all of them, no engine."""
    cache = TowerCache(tower.config, 1, 64, CPU, torch.float32)
    with torch.inference_mode():
        states = cache.extending([cache.allocate(len(tokens))], [len(tokens)], len(tokens))
        return tower.logits(tower(torch.tensor([list(tokens)]), states))[0].log_softmax(-1)


@cache
def _at_once(name: str, tokens: tuple[int, ...]) -> Tensor:
    return _direct(golden(name).context, tokens)


def _same(event: ScoreEvent, log_probs_LV: Tensor, request: ScoreRequest, tolerance: float) -> None:
    """`log_probs_LV`: one row for each token that is scored."""
    scored = request.token_ids[request.start :]
    wanted = [log_probs_LV[place, token].item() for place, token in enumerate(scored)]
    assert event.log_probs == pytest.approx(wanted, abs=tolerance)
    if event.margin >= tolerance:
        assert event.is_greedy == tuple(log_probs_LV[p].argmax().item() == token for p, token in enumerate(scored))


def _settings(chunk: int) -> EngineSettings:
    return EngineSettings(max_sequences=8, max_sequence_length=256, prefill_chunk_tokens=chunk, max_queued_requests=64)


def _score_all(tower: ContextTower, requests: Sequence[ScoreRequest], chunk: int = 64) -> list[ScoreEvent]:
    async def run() -> list[ScoreEvent]:
        async with pair_of(tower, None, _settings(chunk)) as pair:
            return list(await asyncio.gather(*(pair.score(request, 60) for request in requests)))

    return asyncio.run(run())


@PROMPTS
def test_golden_logits(name: str, number: int) -> None:
    """The released code's logits of every position of a prompt, and of what it decoded after it."""
    model = golden(name)
    prompt = model.prompts[number]
    tokens, answer = tuple(prompt["tokens"]), tuple(prompt["ar"]["tokens"])
    whole = ScoreRequest(Id("prompt"), tokens, 1)
    after = ScoreRequest(Id("answer"), tokens + answer, len(tokens))
    first = ScoreRequest(Id("first"), tokens + answer[:8], len(tokens))
    on_prompt, on_answer, on_first = _score_all(model.context, [whole, after, first], chunk=16)
    _same(on_prompt, model.tensors[f"{prompt['id']}.ctx_logits"].log_softmax(-1), whole, LOGITS)
    _same(on_first, model.tensors[f"{prompt['id']}.ar_logits"].log_softmax(-1), first, LOGITS)
    assert on_answer.is_greedy == (True,) * len(answer)
    assert on_answer.log_probs[:8] == pytest.approx(on_first.log_probs, abs=NOISE)


@NAMES
@pytest.mark.parametrize("chunk", [4, pytest.param(16, marks=pytest.mark.slow), 64, 512])
@pytest.mark.slow
def test_a_text_in_chunks_and_in_company_is_the_text_at_once(name: str, chunk: int) -> None:
    tower = golden(name).context
    requests = _texts(tower.config.vocab_size, 10)
    for request, event in zip(requests, _score_all(tower, requests, chunk), strict=True):
        assert event.request_id == request.id
        _same(event, _at_once(name, request.token_ids)[request.start - 1 :], request, NOISE)


@NAMES
def test_the_head_in_pieces_is_the_head_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = golden(name).context
    requests = _texts(tower.config.vocab_size, 4, seed=1)
    at_once = _score_all(tower, requests)
    widest = 0
    logits = ContextTower.logits

    def watched(self: ContextTower, hidden: Tensor) -> Tensor:
        nonlocal widest
        widest = max(widest, hidden.shape[0])
        return logits(self, hidden)

    monkeypatch.setattr(scores, "MAX_LOGITS", 5 * tower.config.vocab_size + 1)
    monkeypatch.setattr(ContextTower, "logits", watched)
    for whole, pieces in zip(at_once, _score_all(tower, requests), strict=True):
        assert pieces.log_probs == pytest.approx(whole.log_probs, abs=NOISE)
    assert widest == 5


def test_the_head_is_applied_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tower, positions = vendored("tt_dense").context, []
    logits = ContextTower.logits

    def watched(self: ContextTower, hidden: Tensor) -> Tensor:
        positions.append(hidden.shape[0])
        return logits(self, hidden)

    monkeypatch.setattr(ContextTower, "logits", watched)
    [event] = _score_all(tower, [ScoreRequest(Id("a"), tuple(range(4, 90)), 70)], chunk=16)
    assert len(event.log_probs) == 16 and positions == [11, 5]  # 69 … 79 in the chunk up to 80, then to the end


@NAMES
@pytest.mark.parametrize("placement", ["colocated", pytest.param("split", marks=pytest.mark.slow)])
@pytest.mark.slow
async def test_beside_requests_of_every_mode(name: str, placement: str) -> None:
    """Their tokens are the released code's, and so are the scores' numbers; but for near-ties in `is_greedy`."""
    model = golden(name)
    prompt = model.prompts[2]
    cases = [case for case in prompt["cases"] if case["eos_token_id"] is None]
    requests = [diffusion_request(prompt, case) for case in cases]
    requests += [causal_request(prompt, mode) for mode in (Mode.AR, Mode.MOCK_AR)]
    wanted = [case["output"] for case in cases] + [prompt["ar"]["tokens"], prompt["mock_ar"]["tokens"]]
    texts = _texts(model.context.config.vocab_size, 12, seed=2)
    alone = await asyncio.to_thread(lambda: [_score_all(model.context, [text])[0] for text in texts])
    towers = Towers(name, model.context, model.denoiser)
    open_pair = split_pair(towers, 2) if placement == "split" else pair_of(model.context, model.denoiser, SETTINGS)
    async with open_pair as pair:
        decoding = [asyncio.create_task(collect(pair, request)) for request in requests]
        together = await asyncio.gather(*(pair.score(text, 60) for text in texts))
        assert [(await decoded).token_ids for decoded in decoding] == wanted
        await _all_free(pair)
    for own, event in zip(alone, together, strict=True):
        assert event.log_probs == pytest.approx(own.log_probs, abs=NOISE)
        assert event.is_greedy == own.is_greedy or min(event.margin, own.margin) < NEAR_TIE


async def _all_free(pair: Pair) -> None:
    deadline = time.monotonic() + 30
    while pair.ledger.running and time.monotonic() < deadline:
        await asyncio.sleep(0.001)
    assert pair.ledger.running == pair.ledger.waiting == 0
    for tower in await pair.context.stats():
        assert (tower.free_slots, tower.free_pages, tower.sequences) == (tower.total_slots, tower.total_pages, 0)


@pytest.mark.parametrize("ticks", range(5))
def test_a_cancel_frees_slot_and_pages_within_one_tick(ticks: int) -> None:
    events: list[Event] = []
    engine = ContextEngine(vendored("tt_dense").context, _settings(16), events.append)
    cache = engine.cache
    whole = cache.room.free_slots, cache.room.free_pages
    with torch.inference_mode():
        engine.add(ScoreRequest(Id("a"), tuple(range(4, 90)), 70))
        for _ in range(ticks):
            engine.tick()
        assert ticks == 0 or (cache.room.free_slots, cache.room.free_pages) == (whole[0] - 1, whole[1] - 6)
        engine.cancel(Id("a"))
        engine.tick()
        assert not engine.tick()
    assert (cache.room.free_slots, cache.room.free_pages) == whole
    assert events == [ReleasedEvent(Id("a"))]


def test_it_needs_no_room_but_for_what_it_reads() -> None:
    """The last token is not read: 17 tokens fit a cache of one page."""
    events: list[Event] = []
    settings = EngineSettings(max_sequences=1, cache_tokens=16, prefill_chunk_tokens=16)
    engine = ContextEngine(vendored("tt_dense").context, settings, events.append)
    with torch.inference_mode():
        engine.add(ScoreRequest(Id("a"), tuple(range(4, 21)), 16))
        assert engine.tick()
        engine.add(ScoreRequest(Id("b"), tuple(range(4, 22)), 16))
        assert not engine.tick()
    answer, released, refused, _ = events
    assert isinstance(answer, ScoreEvent) and len(answer.log_probs) == 1 and released == ReleasedEvent(Id("a"))
    assert isinstance(refused, FailureEvent), "which the ledger would not have let in"


async def test_a_deadline_and_a_reader_that_leaves_free_everything() -> None:
    tower = vendored("tt_dense").context
    settings = EngineSettings(max_sequences=2, max_sequence_length=8192, prefill_chunk_tokens=4)
    text = ScoreRequest(Id("long"), tuple(4 + n % 90 for n in range(8000)), 1)
    async with pair_of(tower, None, settings) as pair:
        with pytest.raises(DeadlineExceeded, match=r"request long: not finished within 0\.05 s"):
            await pair.score(text, 0.05)
        await _all_free(pair)
        scoring = asyncio.create_task(pair.score(text))
        while not pair.ledger.running:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        scoring.cancel()
        await asyncio.gather(scoring, return_exceptions=True)
        await _all_free(pair)
        assert len((await pair.score(ScoreRequest(Id("short"), (5, 6, 7), 2))).log_probs) == 1


@pytest.mark.parametrize("place", [0, 40, 84])
async def test_a_nan_ends_the_request_that_has_it_and_no_other(place: int) -> None:
    """Wherever it is: among the tokens that are scored, or before them."""
    model = vendored("tt_moe")
    tower = copy.deepcopy(model.context)
    with torch.no_grad():
        tower.embeddings.weight[99] = torch.nan
    well = tuple(range(4, 90))
    ill = (*well[:place], 99, *well[place + 1 :])
    requests = [ScoreRequest(Id(name), tokens, 50) for name, tokens in (("ill", ill), ("well", well))]
    async with pair_of(tower, None, _settings(16)) as pair:
        outcomes = await asyncio.gather(*(pair.score(r, 60) for r in requests), return_exceptions=True)
        await _all_free(pair)
    failed, scored = outcomes
    assert isinstance(failed, NumericalError) and "request ill: the context tower's logits hold a NaN" in str(failed)
    assert isinstance(scored, ScoreEvent) and len(scored.log_probs) == 36
