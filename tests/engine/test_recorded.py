"""Recorded passes: the bits of the operations they were recorded from, golden tokens, and when they are used."""

import random
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.engine.decode import SETTINGS, decode_all
from tests.goldens import CPU, MODELS, causal_request, diffusion_request, golden
from twotower.core import Mode
from twotower.decoding.unmasking import Blocks, StepParams
from twotower.engine.capture import passes_for
from twotower.engine.graphs import FixedPasses
from twotower.engine.passes import EagerPasses, Passes, Want
from twotower.engine.recorded import OFTEN, Form, Program, RecordedPasses, _traced, plain_pass
from twotower.engine.settings import EngineSettings
from twotower.errors import ConfigError
from twotower.model.cache import Span, TowerCache
from twotower.model.moe import FEW_TOKENS
from twotower.model.pages import pages_for
from twotower.model.tower import ContextTower, DenoiserTower

FORMS = [
    (tower, Form(width, want, timed, few))
    for tower, width, want, timed in (
        ("context", 1, Want.LOGITS, False),
        ("context", 16, Want.HIDDEN, False),
        ("context", 16, Want.STATES, False),
        ("denoiser", 16, Want.HIDDEN, True),
        ("denoiser", 1, Want.LOGITS, False),
    )
    for few in (True, False)
] + [("context", Form(16, Want.HIDDEN, False, few, keeps_scans=True)) for few in (True, False)]


@cache
def _programs(tower: ContextTower | DenoiserTower) -> dict[Form, Program]:
    """Those an engine prepares. They hold no cache, so one recording serves all tests."""
    passes = RecordedPasses(tower, TowerCache(tower.config, 1, 1, CPU, torch.float32))
    passes.prepare(16)
    return passes._programs


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("which", "form"), FORMS, ids=[f"{which}-{form}" for which, form in FORMS])
@pytest.mark.slow
def test_the_same_bits_for_any_number_of_rows_and_pages(name: str, which: str, form: Form) -> None:
    tower = getattr(golden(name), which)
    program = _programs(tower)[form]
    most = FEW_TOKENS // form.width
    for rows, pages in [(1, 2), (most, 3), (max(1, most // 2), 8)] if form.few else [(most + 1, 2), (most + 9, 5)]:
        draw = random.Random(rows)
        cache = TowerCache(tower.config, rows, rows * pages, CPU, torch.float32)
        for tensor in (cache.conv, cache.ssm, cache.keys, cache.values):
            tensor.normal_(generator=torch.Generator().manual_seed(rows))
        given = []
        for row in range(rows):
            length = draw.randint(1, form.width)
            start = draw.randint(0, 16 * (pages - 1) - 1)
            table = [2 + row * pages + page for page in range(pages)]
            given.append([*(draw.randrange(4, 60) for _ in range(form.width)), row, start, length, *table])
        t_R = torch.rand(rows if form.timed else 0)
        states = [tensor.clone() for tensor in (cache.conv, cache.ssm, cache.keys, cache.values)]
        again = [tensor.clone() for tensor in states]
        with torch.inference_mode():
            wanted = plain_pass(tower, form)(torch.tensor(given), t_R, *states)
            got = program(torch.tensor(given), t_R, *again)
        assert all(torch.equal(*each) for each in zip(got, wanted, strict=True))
        assert all(torch.equal(ours, plain) for ours, plain in zip(again, states, strict=True))


def _prepared(tower: ContextTower | DenoiserTower, memory: TowerCache) -> RecordedPasses:
    passes = RecordedPasses(tower, memory)
    passes._programs.update(_programs(tower))
    return passes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "passes_of",
    [
        EagerPasses,
        pytest.param(_prepared, marks=pytest.mark.slow),
        lambda tower, cache: FixedPasses(tower, cache, 3),
    ],
)
def test_a_pass_for_states_alone_leaves_the_same_ones(name: str, passes_of: Callable[..., Passes]) -> None:
    tower = golden(name).context
    found = []
    for want in (Want.HIDDEN, Want.STATES):
        cache = TowerCache(tower.config, 4, 40, CPU, torch.float32)
        with torch.inference_mode():
            slots = [cache.allocate(100) for _ in range(4)]  # the last is the fixed passes' scratch
            assert slots[3] == 3
            passes = passes_of(tower, cache)
            for width in (16, 9, 40):
                passes.run(slots[:2], [[4 + (7 * i + width) % 50 for i in range(width)], [9] * 5], want=want)
                for slot, length in zip(slots, (width, 5), strict=False):
                    cache.advance(slot, length)
        found.append(
            [
                cache.conv[:, slots[:2]],
                cache.ssm[:, slots[:2]],
                *cache.delta([Span(s, 0, cache.length(s)) for s in slots[:2]]),
            ]
        )
    assert all(torch.equal(whole, spared) for whole, spared in zip(*found, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_for_states_alone_runs_nothing_behind_the_last(name: str) -> None:
    tower = golden(name).context
    cache = TowerCache(tower.config, 1, 4, CPU, torch.float32)
    ran: list[int] = []
    hooks = [layer.register_forward_hook(lambda layer, *_: ran.append(layer.index)) for layer in tower.layers]
    with torch.inference_mode():
        EagerPasses(tower, cache).run([cache.allocate(16)], [[5] * 16], want=Want.STATES)
    for hook in hooks:
        hook.remove()
    pattern = tower.config.hybrid_override_pattern
    assert ran == list(range(max(pattern.rfind("M"), pattern.rfind("*"))))


@pytest.mark.parametrize("name", ["tt_dense", pytest.param("tt_moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [1, 2, 3, 9])
@pytest.mark.slow
def test_a_recorded_step_decides_as_an_eager_one(name: str, rows: int) -> None:
    """Tokens, positions, margins: to the last bit where rows are of the recorded width; with a sampled row, too."""
    tower, draw = golden(name).denoiser, random.Random(rows)
    cache = TowerCache(tower.config, rows, 4 * rows, CPU, torch.float32)
    with torch.inference_mode():
        slots = [cache.allocate(40) for _ in range(rows)]
        for slot in slots:
            cache.advance(slot, draw.randint(0, 40))
        for tensor in (cache.conv, cache.ssm, cache.keys, cache.values):
            tensor.normal_(generator=torch.Generator().manual_seed(rows))
        recorded, eager = _prepared(tower, cache), EagerPasses(tower, cache)
        for widths, temperature in (([16] * rows, 0.0), ([draw.randint(1, 16) for _ in range(rows)], 0.0), ([16], 0.7)):
            masked = [[draw.random() < 0.7 for _ in range(width - 1)] + [True] for width in widths]
            tokens = [[3 if m else draw.randrange(4, 60) for m in mask] for mask in masked]
            params = [StepParams(draw.choice([0.0, 0.3, 1.0]), draw.randint(1, 9), temperature, 5) for _ in widths]
            blocks = Blocks(tokens, masked, params)
            ours, theirs = (p.step(slots[: len(widths)], blocks).tolist() for p in (recorded, eager))
            for mine, other, size in zip(blocks.read(ours), blocks.read(theirs), widths, strict=True):
                assert (mine.tokens[:size], mine.committed[:size]) == (other.tokens[:size], other.committed[:size])
                assert mine.finite and other.finite and mine.margin == pytest.approx(other.margin, abs=1e-5)
            assert ours == theirs or widths != [16] * rows


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_golden_tokens(name: str) -> None:
    model = golden(name)
    wanted = []
    for prompt in model.prompts:
        wanted += [(causal_request(prompt, mode), prompt[str(mode)]["tokens"]) for mode in (Mode.AR, Mode.MOCK_AR)]
        wanted += [(diffusion_request(prompt, case), case["output"]) for case in prompt["cases"]]
    wanted = [(request, tokens[: request.params.max_new_tokens]) for request, tokens in wanted]
    settings = EngineSettings(32, 256, prefill_chunk_tokens=64, max_queued_requests=512, capture="on")
    results = decode_all(model.context, model.denoiser, [request for request, _ in wanted], settings=settings)
    assert [result.token_ids for result in results] == [tokens for _, tokens in wanted]


@pytest.mark.slow
def test_what_comes_up_often_or_is_prepared_is_recorded() -> None:
    model = golden(MODELS[0])
    with torch.inference_mode():
        cache = TowerCache(model.context.config, 2, 20, CPU, torch.float32)
        slot = cache.allocate(200)
        passes = RecordedPasses(model.context, cache, often=3)
        for wanted in (0, 0, 1, 1):
            passes.run([slot], [[5]])
            cache.advance(slot, 1)
            assert len(passes._programs) == wanted
        passes.prepare(16)
        prepared = len(passes._programs)
        for want in (Want.STATES, Want.HIDDEN):
            for _ in range(3):
                passes.run([slot], [[5] * 16], want=want)
        assert len(passes._programs) == prepared, "commits and short prompts were prepared"


def test_a_pass_wider_than_the_vocabulary_is_recorded() -> None:
    """A block may be: its size is the client's choice, and an engine that cannot record it would end."""
    model = golden(MODELS[0])
    width = model.context.config.vocab_size + 8
    with torch.inference_mode():
        cache = TowerCache(model.context.config, 1, pages_for(3 * width), CPU, torch.float32)
        slot = cache.allocate(3 * width)
        passes = RecordedPasses(model.context, cache, often=1)
        for _ in range(2):
            passes.run([slot], [[5] * width])
    assert max(form.width for form in passes._programs) >= width


def test_the_setting_chooses() -> None:
    model = golden(MODELS[0])
    cache = TowerCache(model.context.config, 1, 4, CPU, torch.float32)
    assert isinstance(passes_for(model.context, cache, "off"), EagerPasses)
    assert isinstance(passes_for(model.context, cache, "auto"), RecordedPasses)
    assert SETTINGS.capture == "auto"
    with pytest.raises(ConfigError, match="capture: got 'often', wanted one of auto, on, off"):
        passes_for(model.context, cache, "often")


@pytest.mark.slow
def test_on_records_at_start_and_never_while_serving() -> None:
    model = golden(MODELS[0])
    for tower, widths in ((model.context, {1, 16, 32, 48, 64}), (model.denoiser, {1, 16})):
        cache = TowerCache(tower.config, 1, 20, CPU, torch.float32)
        passes = passes_for(tower, cache, "on")
        assert isinstance(passes, RecordedPasses) and {form.width for form in passes._programs} == widths
        programs, slot = set(passes._programs), cache.allocate(300)
        with torch.inference_mode():
            for _ in range(OFTEN + 1):
                passes.run([slot], [[5] * 80])
        assert set(passes._programs) == programs


def test_two_threads_that_record_leave_the_filters_of_warnings_as_they_were() -> None:
    """These are the whole process's: one thread must not put back what the other has set."""
    before, second_in, first_out = list(warnings.filters), threading.Event(), threading.Event()

    def first(given: Tensor) -> Tensor:
        second_in.wait(0.3)
        return given + 1

    def second(given: Tensor) -> Tensor:
        second_in.set()
        first_out.wait(5)
        return given + 1

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(_traced, first, [torch.zeros(1)])
        one.add_done_callback(lambda _: first_out.set())
        two = pool.submit(_traced, second, [torch.zeros(1)])
        assert one.result()(torch.zeros(1)) == two.result()(torch.zeros(1)) == 1
    assert warnings.filters == before
