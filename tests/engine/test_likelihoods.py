"""Likelihoods of committed tokens are what the scorer says of the same tokens, in every mode, company and transport."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.arrangements import Towers, split_pair
from tests.engine.decode import SETTINGS
from tests.goldens import golden, vendored
from twotower.core import (
    BlockEvent,
    DecodingParams,
    FinishReason,
    Floor,
    Likelihood,
    Mode,
    Request,
    RequestId,
    ScoreEvent,
    ScoreRequest,
)
from twotower.engine import scores
from twotower.engine.context import likelihoods as rating
from twotower.engine.context.sequences import Sequences
from twotower.engine.in_process import pair_of
from twotower.engine.modes.auto import Auto
from twotower.engine.modes.unrated import Unrated
from twotower.engine.pair import Pair
from twotower.engine.passes import Want
from twotower.errors import NumericalError
from twotower.exchange.protocol import Delta
from twotower.model.cache import TowerCache
from twotower.model.tower import ContextTower

NOISE = 1e-4  # of the same pass cut or batched in another way; 1e-5 as a rule
MODES = pytest.mark.parametrize("mode", list(Mode))
Blocks = list[BlockEvent]


def _request(mode: Mode, logprobs: int | None, name: str = "r", prompt: int = 0, **params: Any) -> Request:
    tokens = tuple(golden("tt_dense").prompts[prompt]["tokens"])
    blocks = {} if mode in (Mode.AR, Mode.MOCK_AR) else {"block_size": 8}
    values = {"max_new_tokens": 21, "ignore_eos": True, **blocks, **params}
    return Request(RequestId(name), tokens, DecodingParams(mode, **values), logprobs=logprobs)


async def _told(pair: Pair, request: Request) -> Blocks:
    return [event async for event in pair.generate(request, timeout_s=60)]


async def _scored(pair: Pair, request: Request, events: Blocks) -> tuple[float, ...]:
    """What the scorer says of the tokens that these events tell."""
    history = request.history
    tokens = tuple(token for event in events for token in event.token_ids)
    score = ScoreRequest(RequestId(f"{request.id} scored"), history + tokens, len(history))
    return (await pair.score(score, 60)).log_probs


def _decode(name: str, requests: Sequence[Request], split: bool = False) -> list[tuple[Blocks, tuple[float, ...]]]:
    """Events of all of them, decoded at once, and then what the scorer says of their tokens."""
    model = golden(name)

    async def run() -> list[tuple[Blocks, tuple[float, ...]]]:
        towers = Towers(name, model.context, model.denoiser)
        pairs = split_pair(towers, 2) if split else pair_of(model.context, model.denoiser, SETTINGS)
        async with pairs as pair:
            answers = await asyncio.gather(*(_told(pair, request) for request in requests))
            scored = [await _scored(pair, request, events) for request, events in zip(requests, answers, strict=True)]
            return list(zip(answers, scored, strict=True))

    return asyncio.run(run())


def _likelihoods(events: Blocks) -> list[Likelihood]:
    for event in events:
        assert len(event.likelihoods) == len(event.token_ids)
    return [one for event in events for one in event.likelihoods]


def _tokens(events: Blocks) -> list[int]:
    return [token for event in events for token in event.token_ids]


@MODES
@pytest.mark.parametrize("name", ["tt_dense", pytest.param("tt_moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("split", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_they_are_the_scorers(name: str, mode: Mode, split: bool) -> None:
    """In company with requests of all modes that do not ask, and that ask for more and for less."""
    asks = [_request(mode, most, f"{most}", prompt) for most in (0, 5, 20) for prompt in (0, 1)]
    asks = [replace(request, id=RequestId(f"{place}")) for place, request in enumerate(asks)]
    quiet = [_request(other, None, f"quiet {other}") for other in Mode]
    for request, (events, scored) in zip([*asks, *quiet], _decode(name, [*asks, *quiet], split), strict=True):
        if request.logprobs is None:
            assert not any(event.likelihoods for event in events)
            continue
        told = _likelihoods(events)
        assert [one.log_prob for one in told] == pytest.approx(scored, abs=NOISE)
        assert all(len(one.top_token_ids) == len(one.top_log_probs) == request.logprobs for one in told)


@pytest.mark.parametrize("split", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_they_are_the_scorers_however_auto_decodes(split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts, tokens that the context tower writes alone in a row, and whole answers of `diffusion`."""
    draw = random.Random(5)
    monkeypatch.setattr(Auto, "alone", lambda self, params, blocks, size, *_: draw.choice([0, size, 1]))
    asks = [_request(Mode.AUTO, 2, f"lossless {number}", number % 2) for number in range(4)]
    asks.append(_request(Mode.AUTO, 2, "confidence", floor=Floor.CONFIDENCE, confidence_threshold=0.3))
    for request, (events, scored) in zip(asks, _decode("tt_dense", asks, split), strict=True):
        told = _likelihoods(events)
        assert [one.log_prob for one in told] == pytest.approx(scored, abs=NOISE)
        by_denoiser = request.params.floor is Floor.CONFIDENCE
        assert all((one.confidence is not None) == by_denoiser for one in told)
        assert bool(sum(event.num_ar_blocks for event in events)) != by_denoiser


@MODES
def test_they_change_no_token_and_no_count(mode: Mode) -> None:
    quiet, asking = _request(mode, None, "quiet"), _request(mode, 3, "asking")
    [(bare, _), (told, _)] = _decode("tt_dense", [quiet, asking])
    names = ("num_steps", "num_blocks", "num_drafted", "num_accepted")
    assert _tokens(bare) == _tokens(told)
    if mode is Mode.AUTO:
        return  # its counts are the clock's, asked or not
    assert [sum(getattr(e, name) for e in bare) for name in names] == [
        sum(getattr(e, name) for e in told) for name in names
    ]
    assert bare[-1].finish_reason == told[-1].finish_reason == FinishReason.LENGTH


@MODES
def test_alternatives_are_the_likeliest_of_raw_logits(mode: Mode) -> None:
    """Whatever the temperature: that decides which token is drawn, not how likely it is told to be."""
    request = _request(mode, 4, temperature=1.5, seed=7)
    [(events, _)] = _decode("tt_dense", [request])
    tower, tokens = golden("tt_dense").context, (*request.history, *_tokens(events))
    cache = TowerCache(tower.config, 1, 64, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        states = cache.extending([cache.allocate(len(tokens))], [len(tokens)], len(tokens))
        log_probs_LV = tower.logits(tower(torch.tensor([list(tokens)]), states))[0].log_softmax(-1)
    off_the_best = 0
    for place, one in enumerate(_likelihoods(events)):
        row_V = log_probs_LV[len(request.history) - 1 + place]
        assert one.log_prob == pytest.approx(row_V[_tokens(events)[place]].item(), abs=NOISE)
        assert one.top_log_probs == pytest.approx(row_V.topk(4).values.tolist(), abs=NOISE)
        assert row_V[list(one.top_token_ids)].tolist() == pytest.approx(list(one.top_log_probs), abs=NOISE)
        off_the_best += one.log_prob < one.top_log_probs[0] - NOISE
    assert off_the_best > 3, "at this temperature other tokens than the likeliest are drawn"


@MODES
def test_one_that_goes_on_elsewhere_goes_on_with_them(mode: Mode) -> None:
    request = _request(mode, 2)
    [(whole, _)] = _decode("tt_dense", [request])
    told = _likelihoods(whole)
    for have in (8, 16):
        [(rest, _)] = _decode("tt_dense", [replace(request, committed=tuple(_tokens(whole)[:have]))])
        again = _likelihoods(rest)
        assert rest[0].start == have and len(again) == len(told) - have
        assert [one.log_prob for one in again] == pytest.approx([one.log_prob for one in told[have:]], abs=NOISE)


def test_confidence_is_that_of_the_steps() -> None:
    request = replace(_request(Mode.DIFFUSION, 0, confidence_threshold=0.1), trace=True)
    model = golden("tt_dense")

    async def run() -> list[Any]:
        async with pair_of(model.context, model.denoiser, SETTINGS) as pair:
            return [event async for event in pair.events(request, timeout_s=60)]

    fixed: dict[int, float] = {}
    told: list[float | None] = []
    for event in asyncio.run(run()):
        if isinstance(event, BlockEvent):
            told += [one.confidence for one in event.likelihoods]
        else:
            fixed |= zip(event.positions, event.confidence, strict=True)
    assert told == [fixed[place] for place in range(21)]


@MODES
def test_confidence_is_of_diffusion_alone(mode: Mode) -> None:
    [(events, _)] = _decode("tt_dense", [_request(mode, 0)])
    assert all((one.confidence is not None) == (mode is Mode.DIFFUSION) for one in _likelihoods(events))


@MODES
@pytest.mark.parametrize("new", [1, 2, 8, 9])
def test_short_answers_end(mode: Mode, new: int) -> None:
    """The last tokens of a denoiser's answer are read for their likelihoods alone."""
    [(events, scored)] = _decode("tt_dense", [_request(mode, 1, max_new_tokens=new)])
    assert [one.log_prob for one in _likelihoods(events)] == pytest.approx(scored, abs=NOISE)
    assert len(scored) == new and events[-1].is_last and not any(event.is_last for event in events[:-1])


@MODES
def test_an_answer_ends_at_its_stop_token_with_them(mode: Mode) -> None:
    [(events, _)] = _decode("tt_dense", [_request(mode, None)])
    stop = _tokens(events)[10]
    end = _tokens(events).index(stop) + 1
    [(stopped, scored)] = _decode("tt_dense", [_request(mode, 1, stop_token_ids=(stop,))])
    assert _tokens(stopped) == _tokens(events)[:end] and stopped[-1].finish_reason is FinishReason.STOP
    assert [one.log_prob for one in _likelihoods(stopped)] == pytest.approx(scored, abs=NOISE)


@pytest.mark.parametrize("mode", [Mode.DIFFUSION, Mode.MOCK_AR])
def test_a_prompt_of_one_token(mode: Mode) -> None:
    """In `mock_ar` nothing is read before the first step."""
    request = replace(_request(mode, 1), prompt_token_ids=(7,))
    [(events, scored)] = _decode("tt_dense", [request])
    assert [one.log_prob for one in _likelihoods(events)] == pytest.approx(scored, abs=NOISE)


def test_an_answer_has_room_to_be_read_to_its_end() -> None:
    """Reserved beforehand, like all that a request fills: prompt and new tokens, but no whole last block."""
    for mode in Mode:
        plain, asking = _request(mode, None), _request(mode, 0)
        led = mode in (Mode.DIFFUSION, Mode.MOCK_AR, Mode.AUTO)
        assert asking.positions == (len(plain.prompt_token_ids) + 21 if led else plain.positions)


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.AUTO])  # whose rows are the clock's
def test_who_does_not_ask_pays_no_head(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a request that asks, the head of the context tower goes over no row of one that does not."""
    logits, rows = ContextTower.logits, list[int]()

    def watched(self: ContextTower, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(hidden[..., 0].numel())
        return logits(self, hidden)

    monkeypatch.setattr(ContextTower, "logits", watched)
    quiet = [_request(Mode.DIFFUSION, None, f"quiet {number}") for number in range(3)]
    asking = [] if mode is Mode.DIFFUSION else [_request(mode, None, "asking")]
    model = golden("tt_dense")

    async def run(requests: Sequence[Request]) -> int:
        rows.clear()
        async with pair_of(model.context, model.denoiser, SETTINGS) as pair:
            await asyncio.gather(*(_told(pair, request) for request in requests))
        return sum(rows)

    before = asyncio.run(run([*quiet, *asking]))
    after = asyncio.run(run([*quiet, _request(mode, 5, "asking")]))
    led = mode in (Mode.DIFFUSION, Mode.MOCK_AR)
    assert after - before == (21 if led else 0), "a row for each token that is rated, where the head decides nothing"


def test_ratings_in_pieces_are_ratings_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    request = _request(Mode.DIFFUSION, 3)
    [(at_once, _)] = _decode("tt_dense", [request])
    monkeypatch.setattr(rating, "MAX_LOGITS", 3 * golden("tt_dense").context.config.vocab_size)
    [(pieces, _)] = _decode("tt_dense", [request])
    wanted = [one.log_prob for one in _likelihoods(at_once)]
    assert [one.log_prob for one in _likelihoods(pieces)] == pytest.approx(wanted, abs=NOISE)


@MODES
def test_a_nan_fails_the_request(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ContextTower, hidden: torch.Tensor) -> torch.Tensor:
        return torch.full((*hidden.shape[:-1], self.config.vocab_size), torch.nan)

    monkeypatch.setattr(ContextTower, "logits", broken)
    model = vendored("tt_dense")

    async def run() -> None:
        async with pair_of(model.context, model.denoiser, SETTINGS) as pair:
            with pytest.raises(NumericalError, match="request r: the context tower's logits"):
                await _told(pair, _request(mode, 1))
            async with asyncio.timeout(10):
                while pair.ledger.running:
                    await asyncio.sleep(0.01)

    asyncio.run(run())


def test_joined_and_cut_events_keep_each_tokens_own() -> None:
    def event(start: int, *tokens: int) -> BlockEvent:
        rated = tuple(Likelihood(-float(token)) for token in tokens)
        return BlockEvent(RequestId("r"), start, tokens, len(tokens), len(tokens), likelihoods=rated)

    joined = event(0, 1, 2).joined(event(2, 3))
    assert joined == event(0, 1, 2, 3)
    assert (joined.first(2), joined.after(2)) == (event(0, 1, 2), event(2, 3))


def test_tokens_wait_until_they_are_read() -> None:
    """The last block ends where the answer does; the denoiser has filled all of it."""
    waiting = Unrated(10)
    block = BlockEvent(RequestId("r"), 2, (5, 6), 1, 1, FinishReason.STOP)
    waiting.add(block, (0.5, 0.25, 0.125))
    assert waiting.last_words == (5, 6)
    assert waiting.rated(Delta(0, 8, 12, 0)) is None
    rated = (Likelihood(-1.0), Likelihood(-2.0))
    told = waiting.rated(Delta(0, 12, 14, 0, likelihoods=rated))
    assert told is not None
    assert told.likelihoods == (Likelihood(-1.0, confidence=0.5), Likelihood(-2.0, confidence=0.25))
    assert not waiting.last_words


@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_commit_pass_goes_to_its_end_only_where_a_row_asks(
    logprobs: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wants, read = list[Want](), Sequences.read

    def watched(self: Sequences, keys: Sequence[Any], want: Want) -> torch.Tensor:
        wants.append(want)
        return read(self, keys, want)

    monkeypatch.setattr(Sequences, "read", watched)
    _decode("tt_dense", [_request(Mode.DIFFUSION, logprobs)])
    assert set(wants) == {Want.STATES if logprobs is None else Want.HIDDEN}


def test_the_scorer_tells_alternatives_to_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch with others that ask for more, for less and for none, and in pieces of the head's rows."""
    model = golden("tt_dense")
    tokens = tuple(model.prompts[0]["tokens"])
    monkeypatch.setattr(scores, "MAX_LOGITS", 5 * model.context.config.vocab_size)
    requests = [
        ScoreRequest(RequestId(f"{number}"), tokens[: 12 + number], 1, logprobs=most)
        for number, most in enumerate((None, 0, 3, 7))
    ]

    async def run() -> list[ScoreEvent]:
        async with pair_of(model.context, None, SETTINGS) as pair:
            return list(await asyncio.gather(*(pair.score(request, 60) for request in requests)))

    for request, event in zip(requests, asyncio.run(run()), strict=True):
        if request.logprobs is None:
            assert event.likelihoods == ()
            continue
        assert tuple(one.log_prob for one in event.likelihoods) == pytest.approx(event.log_probs, abs=1e-6)
        for one, is_greedy in zip(event.likelihoods, event.is_greedy, strict=True):
            assert len(one.top_token_ids) == request.logprobs
            if request.logprobs:
                assert is_greedy == (one.log_prob == one.top_log_probs[0])
