"""Whole pairs on GPUs that are none (`tests/cuda_stand_in.py`): the tokens are those of the CPU, CUDA's rules are kept.

The stand-in refuses every tensor, stream, event and group of a device without an index, wherever it is made.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests import cuda_stand_in
from tests.cuda_stand_in import Gpus, gpus
from tests.engine.arrangements import Towers, split_pair
from tests.engine.decode import collect
from tests.exchange.rig import QUICK
from tests.flash_stand_ins import AnyTower, FlashStandIns
from tests.goldens import CPU, GOLDEN_DIR, MODELS, VENDORED
from tests.nccl_stand_in import ProcessGroupNCCL, stand_in
from twotower.core import DecodingParams, Mode, Request, RequestId
from twotower.engine import capture, in_process
from twotower.engine.capture import passes_for
from twotower.engine.graphs import FixedPasses, PassShape
from twotower.engine.in_process import open_pair, pick_device
from twotower.engine.pair import Pair
from twotower.engine.passes import USUAL_WIDTH, EagerPasses, Want
from twotower.engine.settings import EngineSettings, PrefixMemory
from twotower.errors import ConfigError
from twotower.expert_formats import ExpertFormat
from twotower.model.attention import Attention
from twotower.model.cache import TowerCache
from twotower.model.checkpoint import Checkpoint
from twotower.model.kernels import paged_attention
from twotower.model.loading import load_context_tower, load_denoiser_tower
from twotower.model.moe import FEW_TOKENS
from twotower.model.pages import page_tokens_on
from twotower.model.snapshots import Snapshots

SETTINGS = EngineSettings(max_sequences=2, max_sequence_length=60, prefill_chunk_tokens=32, capture="off")
SECOND = torch.device("cuda", 1)
NAMES = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    with gpus(2, monkeypatch) as found, stand_in(monkeypatch):
        yield found


def _requests() -> list[Request]:
    params = DecodingParams(max_new_tokens=10, block_size=8, confidence_threshold=0.2, ignore_eos=True)
    prompt = tuple(range(4, 40))
    return [Request(RequestId(mode), prompt[: 36 - i], replace(params, mode=mode)) for i, mode in enumerate(Mode)]


async def _decode(pair: Pair) -> list[list[int]]:
    return [list(d.token_ids) for d in await asyncio.gather(*(collect(pair, request) for request in _requests()))]


async def _in_process(name: str, device: str, settings: EngineSettings = SETTINGS) -> list[list[int]]:
    async with open_pair(GOLDEN_DIR / name, settings, device) as pair:
        cuda_stand_in.GPUS.serving = True
        return await _decode(pair)


@pytest.fixture
def captured_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of SETTINGS have too few tokens for grouped products, so experts in fp32 can be captured after all. If a
    grouped product is called, the stand-in says so. In bf16 there would be no tokens to compare with: a CPU rounds
    otherwise."""
    assert SETTINGS.max_sequences * USUAL_WIDTH <= FEW_TOKENS
    monkeypatch.setattr(capture, "grouped_products_wait", lambda *_: False)


@NAMES
@pytest.mark.slow
async def test_a_pair_on_the_second_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = await _in_process(name, "cpu")
    with gpus(2, monkeypatch) as machine:
        assert await _in_process(name, "cuda:1") == wanted
    assert machine.captures == machine.device_waits == 0
    assert machine.uploads and not machine.foreign_uploads, "every thread's current device is the process's"
    assert set(machine.streams) == {SECOND}


@NAMES
@pytest.mark.slow
async def test_captured_at_start_and_never_while_serving(
    name: str, captured_in_fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = await _in_process(name, "cpu")
    with gpus(2, monkeypatch) as machine:
        assert await _in_process(name, "cuda:1", replace(SETTINGS, capture="on")) == wanted
    # Rows 1 and 2, each with one page. A context tower has 3 forms of blocks, drafts among them, and 3 of tokens, a
    # denoiser 1 and 2.
    assert machine.captures == 2 * ((3 + 1) + (3 + 2))
    assert len(machine.pools) == 2, "one a tower"
    assert machine.replays > 10
    assert machine.device_waits == 0
    assert machine.uploads and not machine.foreign_uploads


@NAMES
@pytest.mark.slow
async def test_pages_are_read_in_place_in_captures(
    name: str, captured_in_fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = await _in_process(name, "cpu")
    for load in (load_context_tower, load_denoiser_tower):
        monkeypatch.setattr(in_process, load.__name__, lambda *given, load=load: _reading_in_place(load(*given)))
    with gpus(2, monkeypatch) as machine:
        assert await _in_process(name, "cuda:1", replace(SETTINGS, capture="on")) == wanted
    assert machine.replays > 10 and machine.device_waits == 0


@pytest.mark.parametrize("memory", list(PrefixMemory))
async def test_kept_prefixes(memory: PrefixMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device, or on the host and copied back: the tokens are the same, and nobody waits for a copy."""
    stride = page_tokens_on("cuda")
    settings = replace(
        SETTINGS, max_sequence_length=2 * stride, prefill_chunk_tokens=stride, prefix_cache_bytes=2**20,
        prefix_cache_in=memory,
    )  # fmt: skip
    begun = tuple(4 + place % 40 for place in range(stride))
    requests = [
        Request(RequestId(f"{number}"), (*begun, *behind), DecodingParams(mode=Mode.AR, max_new_tokens=6))
        for number, behind in enumerate([(5, 6), (7,), (5, 6)])
    ]

    async def answers(device: str) -> list[tuple[int, list[int]]]:
        found = []
        async with open_pair(GOLDEN_DIR / MODELS[0], settings, device) as pair:
            cuda_stand_in.GPUS.serving = device != "cpu"
            for request in requests:
                events = [event async for event in pair.generate(request, 30)]
                found.append((events[0].cached_tokens, [token for event in events for token in event.token_ids]))
        return found

    wanted = await answers("cpu")
    homes: list[torch.device] = []
    monkeypatch.setattr(Snapshots, "save", _noting(Snapshots.save, homes))
    with gpus(2, monkeypatch) as machine:
        assert await answers("cuda:1") == wanted
    assert [cached for cached, _ in wanted] == [0, stride, stride]
    assert set(homes) == {torch.device("cpu") if memory is PrefixMemory.HOST else SECOND}
    assert machine.device_waits == 0


def _noting(save: Callable[[Snapshots, int, int], None], homes: list[torch.device]) -> Callable[..., None]:
    def noting(self: Snapshots, slot: int, snapshot: int) -> None:
        homes.append(self.ssm.device)
        save(self, slot, snapshot)

    return noting


@pytest.mark.parametrize(
    ("name", "captured"), [(MODELS[0], "off"), *(pytest.param(name, "on", marks=pytest.mark.slow) for name in MODELS)]
)
@pytest.mark.slow
async def test_two_gpus_over_nccl(
    name: str, captured: str, captured_in_fp32: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, settings = await _in_process(name, "cpu"), replace(SETTINGS, capture=captured)
    with gpus(2, monkeypatch) as machine, stand_in(monkeypatch):
        checkpoint, dtype = Checkpoint.open(GOLDEN_DIR / name), torch.float32
        context, denoiser = pick_device("cuda"), pick_device("cuda:1")
        towers = Towers(
            name,
            load_context_tower(checkpoint, context, dtype, kernels="torch"),
            load_denoiser_tower(checkpoint, denoiser, dtype, kernels="torch"),
        )
        machine.foreign_uploads = 0  # one thread loaded both
        async with split_pair(towers, 1, settings, QUICK) as pair:
            machine.serving = True
            assert await _decode(pair) == wanted
    groups = sorted(ProcessGroupNCCL.groups, key=lambda group: group.rank)
    assert [group.communicators for group in groups] == [{0}, {1}]
    works = [work for group in groups for work in group.works]
    assert len(works) > 4 and not any(work.slept for work in works)
    assert machine.device_waits == machine.foreign_uploads == 0


@pytest.mark.parametrize(
    ("dtype", "capability", "said"),
    [("float32", (9, 0), "float32 on a GPU of compute capability 9.0"), ("bfloat16", (8, 6), "bfloat16 on .* 8.6")],
)
async def test_experts_that_make_the_host_wait_are_not_captured(
    dtype: str, capability: tuple[int, int], said: str, machine: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by name, before any weight is read."""
    machine.capability = capability
    monkeypatch.setattr(in_process, "load_context_tower", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=f"capture: got 'on' for experts in {said}.*wanted dtype bfloat16"):
        async with open_pair(VENDORED / "tt_moe", replace(SETTINGS, capture="on"), "cuda:1", dtype):
            pass


async def test_quantised_experts_are_captured_through_their_kernel_alone(
    machine: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 there is none: refused before weights are read. In bf16 it may not be there, which loading finds out."""
    machine.capability = (8, 6)
    settings = replace(SETTINGS, capture="on", experts="int8")
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="for experts in int8 of a model in float32"):
        patch.setattr(in_process, "load_context_tower", lambda *_: pytest.fail("weights were read"))
        async with open_pair(VENDORED / "tt_moe", settings, "cuda:1", "float32"):
            pass
    tower = load_denoiser_tower(
        Checkpoint.open(VENDORED / "tt_moe", ExpertFormat(8)), SECOND, torch.bfloat16, kernels="torch"
    )
    cache = TowerCache(tower.config, 4, 16, SECOND, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"without the Triton kernel.*int8 unpacked expert by expert \(asked for\)"):
        passes_for(tower, cache, "on")


def test_experts_in_bf16_are_captured(machine: Gpus) -> None:
    """Grouped products are in what is replayed: it gives what an eager pass gives."""
    rows = 4
    tower = load_denoiser_tower(Checkpoint.open(VENDORED / "tt_moe"), SECOND, torch.bfloat16, kernels="torch")
    cache = TowerCache(tower.config, rows, 4 * rows, SECOND, torch.bfloat16)
    slots, given = [cache.allocate(60) for _ in range(rows)], ([[5, 3] * 8] * rows, [0.5] * rows)
    passes = FixedPasses(tower, cache, rows, longest=60)
    with torch.inference_mode():
        passes.capture(slots, 16, True, Want.HIDDEN)
        replayed = passes.run(slots, *given, Want.HIDDEN)
        eager = EagerPasses(tower, cache).run(slots, *given, Want.HIDDEN)
    assert (machine.captures, machine.replays) == (1, 1)
    torch.testing.assert_close(replayed.inner, eager.inner, atol=0.05, rtol=0.05)  # type: ignore[attr-defined]


@NAMES
@pytest.mark.slow
def test_drafts_are_captured(name: str, machine: Gpus, captured_in_fp32: None) -> None:
    """A replay changes no state, and leaves scans that move the states on as an eager pass's do."""
    tower = load_context_tower(Checkpoint.open(GOLDEN_DIR / name), SECOND, torch.float32, kernels="torch")
    cache, plain_cache = (TowerCache(tower.config, 2, 16, SECOND, torch.float32) for _ in range(2))
    slots = [cache.allocate(60) for _ in range(2)]
    assert slots == [plain_cache.allocate(60) for _ in range(2)]
    drafts, cuts = [[5, 3, 7, 11] * 4, [9, 2, 4]], [6, 1]
    passes, eager = FixedPasses(tower, cache, cache.scratch_slot, longest=60), EagerPasses(tower, plain_cache)
    with torch.inference_mode():
        passes.capture(slots, USUAL_WIDTH, False, Want.HIDDEN, keeps_scans=True)
    machine.serving = True
    with torch.inference_mode():
        for round_ in (1, 2):
            hidden, scans = passes.verify(slots, drafts)
            assert machine.replays == round_
            plain, plain_scans = eager.verify(slots, drafts)
            for row, ids in enumerate(drafts):
                torch.testing.assert_close(hidden[row, : len(ids)].inner, plain[row, : len(ids)].inner)
            cache.settle(slots, scans, cuts)
            plain_cache.settle(slots, plain_scans, cuts)
        replays = machine.replays
        passes.verify(slots, [[5] * 17] * 2)  # wide
    assert machine.replays == replays
    for ours, plain in ((cache.ssm, plain_cache.ssm), (cache.conv, plain_cache.conv)):
        torch.testing.assert_close(ours[:, slots].inner, plain[:, slots].inner)  # type: ignore[attr-defined]


@NAMES
def test_passes_that_read_pages_in_place_are_captured(name: str, machine: Gpus, captured_in_fp32: None) -> None:
    """A GPU's cache has pages of 256 positions. A replay asks the host for nothing, gathers nothing, and gives what an
    eager pass gives that gathers."""
    checkpoint = Checkpoint.open(GOLDEN_DIR / name)
    context = load_context_tower(checkpoint, SECOND, torch.float32, kernels="torch")
    denoiser = load_denoiser_tower(checkpoint, SECOND, torch.float32, kernels="torch")
    cache = TowerCache(context.config, 2, 8, SECOND, torch.float32)
    assert cache.page_tokens == 256
    slots, prompts, given = [cache.allocate(300) for _ in range(2)], [[6, 5] * 125, [8] * 30], [[5, 3] * 8, [9, 2, 4]]
    with torch.inference_mode():
        EagerPasses(context, cache).run(slots, prompts, want=Want.STATES)
        for slot, ids in zip(slots, prompts, strict=True):
            cache.advance(slot, len(ids))
        plain = EagerPasses(denoiser, cache).run(slots, given, [0.5, 0.25], Want.HIDDEN)
        drafted, _ = EagerPasses(context, cache).verify(slots, given)
        for tower, wanted in ((_reading_in_place(denoiser), plain), (_reading_in_place(context), drafted)):
            t = None if tower is context else [0.5, 0.25]
            passes = FixedPasses(tower, cache, cache.scratch_slot, longest=300)
            passes.capture(slots, 16, t is not None, Want.HIDDEN, keeps_scans=t is None)
            replayed = passes.verify(slots, given)[0] if t is None else passes.run(slots, given, t, Want.HIDDEN)
            for row, ids in enumerate(given):
                torch.testing.assert_close(replayed[row, : len(ids)].inner, wanted[row, : len(ids)].inner)
    assert (machine.captures, machine.replays) == (2, 2)


def _reading_in_place(tower: AnyTower) -> AnyTower:
    """Through flash-attn's stand-in, and through nothing else."""
    for module in tower.modules():
        if isinstance(module, Attention):
            kernel = paged_attention.flash_attn(FlashStandIns(any_dtype=True).load("flash_attn"))
            module.attend_in_pages = paged_attention.attention(kernel)
            module.attend = _gathered
    return tower


def _gathered(*_: object) -> torch.Tensor:
    raise AssertionError("pages were gathered")


@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.float32, (9, 0)), (torch.bfloat16, (8, 6)), (torch.bfloat16, (12, 0))]
)
def test_a_capture_of_grouped_products_that_wait_would_be_seen(
    dtype: torch.dtype, capability: tuple[int, int], machine: Gpus
) -> None:
    """The stand-in's own rule, which is torch's."""
    rows, experts = torch.zeros(8, 16, dtype=dtype, device=SECOND), torch.zeros(2, 16, 16, dtype=dtype, device=SECOND)
    ends = torch.full((2,), 4, dtype=torch.int32, device=SECOND)

    def capture() -> None:
        stream = torch.cuda.Stream(SECOND)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), object(), stream, "thread_local"):  # type: ignore[arg-type]
            F.grouped_mm(rows, experts, offs=ends)

    machine.capability = capability
    with pytest.raises(AssertionError, match="_grouped_mm: a capture that lets the host wait"):
        capture()
    machine.capability = (9, 0)
    if dtype is torch.bfloat16:
        capture()


@pytest.mark.slow
def test_what_was_not_captured_runs_eagerly(machine: Gpus) -> None:
    checkpoint = Checkpoint.open(VENDORED / "tt_dense")
    tower = load_context_tower(checkpoint, SECOND, torch.float32, kernels="torch")
    cache = TowerCache(tower.config, 2, 40, SECOND, torch.float32)
    passes = passes_for(tower, cache, "on", longest=60)
    assert isinstance(passes, FixedPasses)
    captured, machine.serving = machine.captures, True
    long, short = cache.allocate(400), cache.allocate(60)
    cache.advance(long, 300)
    with torch.inference_mode():
        passes.run([short], [[5] * 16], want=Want.STATES)
        replays = machine.replays
        assert replays == 1
        passes.run([short], [[5] * 16], want=Want.LOGITS)  # a form that no engine asks for
        passes.run([long], [[5]])  # longer than was said
        passes.run([short], [[5] * 17], want=Want.STATES)  # wide
    assert (machine.captures, machine.replays) == (captured, replays)


def test_a_capture_while_serving_would_be_seen(machine: Gpus) -> None:
    """The stand-in's own rules."""
    machine.serving = True
    with pytest.raises(AssertionError, match="while serving"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        raise RuntimeError("captured")
    for made in (lambda: torch.zeros(2, device="cuda"), lambda: torch.cuda.Stream("cuda"), lambda: _mixed()):
        with pytest.raises(AssertionError, match=r"without an index|operands on"):
            made()


def _mixed() -> None:
    torch.zeros(2, device="cuda:0") + torch.zeros(2, device="cuda:1")


def test_many_long_rows_are_not_captured() -> None:
    """Their keys and values would fill the graphs' memory; and a denoiser's pass has no more positions than it may."""
    checkpoint = Checkpoint.open(GOLDEN_DIR / MODELS[0])
    tower = load_denoiser_tower(checkpoint, CPU, torch.float32)
    cache = TowerCache(tower.config, 256, 100_000, torch.device("meta"), torch.float32)
    shapes = list(FixedPasses(tower, cache, 256, longest=1 << 17)._shapes(16))
    assert len(set(shapes)) == len(shapes)
    assert max(shape.rows * shape.pages for shape in shapes) == 1 << 14
    assert max(shape.rows for shape in shapes) == 128
    assert shapes[0].rows == 128, "the largest first"
    assert PassShape(1, 16, 1 << 14, Want.HIDDEN, True) in shapes


@pytest.mark.parametrize(("name", "index"), [("auto", 1), ("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_device_has_its_index(machine: Gpus, name: str, index: int) -> None:
    with machine.on(SECOND):
        assert pick_device(name) == torch.device("cuda", index)


@pytest.mark.parametrize("name", ["cuda:2", "cuda:99999", "cuda:-1", "cuda:01", "cuda:", "gpu", "mps", "", "CUDA:0"])
def test_a_device_that_is_not_there(machine: Gpus, name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"device: got '{name}', (but this process sees 2 CUDA devices|wanted auto, )"
    ):
        pick_device(name)
