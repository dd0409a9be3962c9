"""The planner's figures: held to what others publish of the released model, to the towers, and to each other."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from twotower.commands import main
from twotower.config import ModelConfig
from twotower.engine.memory import memory_of
from twotower.engine.settings import EngineSettings
from twotower.errors import ConfigError
from twotower.exchange.settings import SSM_WIRE_DTYPES
from twotower.expert_formats import ExpertFormat
from twotower.model.tower import ContextTower, DenoiserTower
from twotower.planner.beside import GREEDY, SAMPLED, beside
from twotower.planner.ceilings import Planner
from twotower.planner.devices import DEVICES, Assumed, device_named
from twotower.planner.passes import Batch, Kind, kv_bytes, state_bytes, uniform
from twotower.planner.released import RELEASED

MIB = 1 << 20


@pytest.fixture(scope="module")
def h200() -> Planner:
    return Planner(RELEASED, DEVICES["h200"])


def test_published_sizes_of_the_released_model(h200: Planner) -> None:
    """NVIDIA: 59 GB a tower (GiB, in fact), 31.6 B parameters, 6 of 128 experts. States take 47 MiB and 6 KiB a token,
    49.5 MB a block on the wire.
    """
    assert h200.context.total / (1 << 30) == pytest.approx(58.8, abs=0.1)
    assert h200.context.total / 2 == pytest.approx(31.6e9, rel=0.005)
    experts = h200.context.bytes["experts"] + h200.context.bytes["shared experts"]
    assert experts / h200.context.total == pytest.approx(0.945, abs=0.001)
    assert state_bytes(RELEASED) / MIB == pytest.approx(47.1, abs=0.05) and kv_bytes(RELEASED) == 6 * 1024
    assert (state_bytes(RELEASED) + 16 * kv_bytes(RELEASED)) / 1e6 == pytest.approx(49.5, abs=0.1)


def test_published_cost_of_a_pass(h200: Planner) -> None:
    """A roofline that others derived: 69 of 128 experts touched by 16 tokens, 8.6 ms a pass of one row on an H200."""
    assert uniform(RELEASED)(16) == pytest.approx(69, abs=0.5)
    assert h200.seconds(Kind.DENOISE, 1, 1024) == pytest.approx(8.6e-3, rel=0.02)


def test_both_towers_fit_one_h200_and_no_h100(h200: Planner) -> None:
    assert h200.sequences(8192, 2) > 16
    h100 = replace(h200, device=DEVICES["h100"])
    assert h100.sequences(8192, 2) == 0 and h100.sequences(8192, 1) > 16


@pytest.mark.parametrize("tower", [ContextTower, DenoiserTower])
def test_parts_sum_up_to_what_a_process_would_allocate(
    tower: type[ContextTower] | type[DenoiserTower], h200: Planner
) -> None:
    told = h200.context if tower is ContextTower else h200.denoiser
    settings = EngineSettings(max_sequences=1, max_sequence_length=512)
    assert told.total == memory_of(RELEASED, settings, torch.bfloat16, [tower]).weights


def test_a_pass_moves_no_more_experts_than_there_are_and_a_commit_no_head(h200: Planner) -> None:
    whole = h200.context.bytes["experts"]
    for rows in (1, 4, 16, 64, 256):
        parts = {part.name: part for part in h200.cost(Kind.COMMIT, rows, 8192).parts}
        assert parts["experts"].bytes <= whole * 22 / 23 + 1 and parts["head"].bytes == 0
        step = {part.name: part for part in h200.cost(Kind.STEP, rows, 8192).parts}
        assert step["experts"].bytes <= whole and step["head"].bytes > h200.context.bytes["head"]


def test_more_rows_cost_more_and_longer_contexts_too(h200: Planner) -> None:
    for kind in Kind:
        times = [h200.seconds(kind, rows, 8192) for rows in (1, 4, 16, 64, 256)]
        assert times == sorted(times) and h200.seconds(kind, 16, 131072) > h200.seconds(kind, 16, 8192)


def test_a_prompt_is_read_in_the_engines_chunks(h200: Planner) -> None:
    """512 tokens touch every expert, and meet each weight 32 times as often as a block."""
    chunk, block = h200.cost(Kind.PREFILL, 1, 1024), h200.cost(Kind.VERIFY, 1, 1024)
    parts = {part.name: part for part in chunk.parts}
    assert parts["experts"].bytes == pytest.approx(h200.context.bytes["experts"], rel=1e-6)
    assert chunk.operations > 0.8 * 32 * block.operations


def test_one_row_reads_the_active_experts_only(h200: Planner) -> None:
    """A step of one token: 6 of 128 experts, 3.3 billion weights with all that is not routed."""
    moved = h200.cost(Kind.STEP, 1, 1)
    assert moved.bytes / 2 == pytest.approx(3.3e9, rel=0.05)
    assert moved.operations == pytest.approx(2 * 3.2e9, rel=0.1)


def test_the_routing_that_is_given_counts(h200: Planner) -> None:
    alike = h200.cost(Kind.DENOISE, 1, 8192, lambda _kind, _batch: 6.0)
    assert alike.bytes < 0.3 * h200.cost(Kind.DENOISE, 1, 8192).bytes


def test_ceilings_follow_from_the_passes(h200: Planner) -> None:
    drafting, reading = h200.seconds(Kind.DENOISE, 16, 8192), h200.seconds(Kind.COMMIT, 16, 8192)
    steps = 16 / h200.assumed.tokens_per_step
    assert h200.diffusion(16, 8192, 0).tokens == pytest.approx(16 * 16 / (steps * drafting + reading))
    assert h200.diffusion(16, 8192, 1).tokens == pytest.approx(16 * 16 / (steps * drafting))
    best = h200.best("diffusion", 16, 8192)
    assert 4 <= best.denoisers <= 6 and best.per_device > 1.5 * h200.diffusion(16, 8192, 1).per_device


def test_our_code_moves_little_more_than_it_must(h200: Planner) -> None:
    """64 rows with 8k tokens each. What is left where kernels do it are the copies of states: no more at 64k tokens."""
    moved = beside(RELEASED, Batch(64, 8192, 16))
    times = moved.factors(h200.cost(Kind.DENOISE, 64, 8192))
    assert times["kernels"] < 1.09 < 1.15 < times["greedy"] < 1.19 < times["sampled"] < 1.46
    longer = beside(RELEASED, Batch(64, 1 << 16, 16)).factors(h200.cost(Kind.DENOISE, 64, 1 << 16))
    assert longer["kernels"] < times["kernels"] and longer["greedy"] > 1.5
    assert moved.states == pytest.approx(2 * 64 * 47.1 * MIB, rel=1e-3)
    assert moved.pages == pytest.approx(2 * 64 * 8208 * 6 * 1024)
    assert moved.in_place == pytest.approx(6 * 64 * 16 * 32 * (9 * 128 * 2 + 8 * 4))
    assert (GREEDY, SAMPLED) == (28, 340)


def test_what_does_not_fit_is_no_best(h200: Planner) -> None:
    assert not h200.diffusion(256, 8192, 0).fits and not h200.ar(1024, 8192).fits
    assert h200.best("diffusion", 256, 8192).denoisers <= 2


def test_a_slow_link_holds_back_the_context_tower(h200: Planner) -> None:
    slow = replace(h200, device=replace(h200.device, link=1e9))
    assert slow.diffusion(64, 8192, 6).tokens < 0.5 * h200.diffusion(64, 8192, 6).tokens


def test_rounded_states_take_less_of_a_slow_link(h200: Planner) -> None:
    slow = replace(h200, device=replace(h200.device, link=1e9))
    rounded = replace(slow, assumed=replace(slow.assumed, ssm_wire_dtype="int8"))
    assert slow.block_on_the_wire == state_bytes(RELEASED) + 16 * kv_bytes(RELEASED)
    assert 0.25 * slow.block_on_the_wire < rounded.block_on_the_wire < 0.28 * slow.block_on_the_wire
    assert rounded.diffusion(64, 8192, 6).tokens > 3.5 * slow.diffusion(64, 8192, 6).tokens


@pytest.mark.parametrize("wire", SSM_WIRE_DTYPES)
def test_rounding_takes_time_of_both_towers(h200: Planner, wire: str) -> None:
    """So over NVLink, whose link holds nobody back, it gains nothing."""
    planned = replace(h200, assumed=replace(h200.assumed, ssm_wire_dtype=wire))
    for denoisers in (1, 6):
        rates = [planner.diffusion(64, 8192, denoisers).tokens for planner in (planned, h200)]
        assert rates[0] == rates[1] if wire == "float32" else 0.5 * rates[1] < rates[0] < rates[1]
    assert planned.diffusion(64, 8192, 0) == h200.diffusion(64, 8192, 0)


def test_every_architecture_that_loads_has_a_plan() -> None:
    dense = ModelConfig(hybrid_override_pattern="M-M*-")
    for config in (dense, ModelConfig(hybrid_override_pattern="M"), ModelConfig(hybrid_override_pattern="*E")):
        planner = Planner(config, DEVICES["b200"])
        assert planner.ar(1, 1024).tokens > 0 and planner.diffusion(1, 1024, 0).tokens > 0


# Experts of the released model: 23 layers, 128 of them, two matrices of 1856 x 2688.
NUMBERS = 23 * 128 * 2 * 1856 * 2688


@pytest.mark.parametrize(
    ("form", "bits"), [(ExpertFormat(8), 8), (ExpertFormat(4, 32), 4.5), (ExpertFormat(4, 64), 4.25)]
)
def test_quantised_experts_take_their_bits_and_nothing_else_changes(
    form: ExpertFormat, bits: float, h200: Planner
) -> None:
    ours = replace(h200, config=RELEASED.with_experts(form))
    assert ours.context.bytes["experts"] == pytest.approx(NUMBERS * bits / 8, rel=2e-3)  # int8 has a scale a channel
    assert {part: n for part, n in ours.context.bytes.items() if part != "experts"} == {
        part: n for part, n in h200.context.bytes.items() if part != "experts"
    }
    for kind in Kind:
        mine, theirs = ours.cost(kind, 4, 8192), h200.cost(kind, 4, 8192)
        spared = (h200.context.bytes["experts"] - ours.context.bytes["experts"]) / h200.context.bytes["experts"]
        parts = {part.name: part for part in theirs.parts}
        assert theirs.bytes - mine.bytes == pytest.approx(parts["experts"].bytes * spared, rel=1e-6)
        assert sum(part.bf16 for part in mine.parts) == pytest.approx(sum(part.bf16 for part in theirs.parts))


def test_both_towers_fit_one_gpu_of_80_gb_with_quantised_experts(h200: Planner) -> None:
    h100 = replace(h200, device=DEVICES["h100"], config=RELEASED.with_experts(ExpertFormat(4, 32)))
    assert h100.sequences(8192, 2) == 341
    assert replace(h100, config=RELEASED.with_experts(ExpertFormat(8))).sequences(8192, 2) == 82
    assert h100.seconds(Kind.DENOISE, 1, 8192) < 0.4 * replace(h200, device=DEVICES["h100"]).seconds(
        Kind.DENOISE, 1, 8192
    )


def test_unpacking_counts_where_rows_are_many(h200: Planner) -> None:
    """A weight is unpacked once for 32 rows of its expert; in a prompt's chunk that takes longer than reading it."""
    ours = replace(h200, config=RELEASED.with_experts(ExpertFormat(4, 32)))
    few, many = ({part.name: part for part in ours.cost(Kind.PREFILL, rows, 8192).parts}["experts"] for rows in (1, 16))
    assert many.fp32 == pytest.approx(12 * few.fp32) and few.fp32 == pytest.approx(4 * NUMBERS)
    assert many.seconds(ours.device) > many.bytes / ours.device.bandwidth


def test_plan_takes_a_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--device", "h100", "--experts", "int4", "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "Weights in bf16, experts in int4, groups of 32; GB" in out and "no room" not in out
    assert main(["plan", "--experts", "int4", "--expert-group", "128"]) == 2
    assert "groups of 128 do not divide 1856 (moe_intermediate_size); wanted int4 in groups of 16 or 32 or 64" in (
        capsys.readouterr().err
    )
    assert main(["plan", "--experts", "int6"]) == 2


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--device", "h200", "--rows", "1,64", "--context", "1024"]) == 0
    out = capsys.readouterr().out
    assert "nothing is measured" in out and "diffusion, colocated: faster than ar at 64 rows" in out
    assert "49.5 MB a block, 0.11 ms of the link, with Mamba states in float32" in out
    assert main(["plan", "--device", "h100-pcie", "--rows", "1", "--ssm-wire-dtype", "int8"]) == 0
    assert "13.7 MB a block, 0.21 ms of the link, with Mamba states in int8" in capsys.readouterr().out
    assert main(["plan", "--checkpoint", "demo", "--device", "rtx-4090", "--json", "--rows", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["device"] == "rtx-4090" and told["ceilings"][0]["ar"]["tokens_a_second_a_device"] > 0


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--device", "tpu"], "device: got 'tpu', wanted one of h100, h200"),
        (["--checkpoint", "nowhere"], "nowhere/config.json: no such file"),
    ],
)
def test_what_the_command_refuses(arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "wanted"),
    [
        ("--rows", "0", "wanted a whole number from 1"),
        ("--rows", "9999", "wanted at most 4096"),
        ("--context", "x", "wanted a whole number from 1"),
        ("--tokens-per-step", "17", "wanted more than 0 and at most 16"),
        ("--tokens-per-round", "nan", "wanted more than 0 and at most 16"),
        ("--reached", "0", "wanted more than 0"),
        ("--kept-free", "1.5", "wanted a number from 0 to 1"),
        ("--ssm-wire-dtype", "int4", "invalid choice: 'int4'"),
    ],
)
def test_flags_out_of_bounds(flag: str, value: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", flag, value])
    assert ended.value.code == 2 and wanted in capsys.readouterr().err


def test_an_unknown_device_and_what_is_assumed() -> None:
    with pytest.raises(ConfigError, match="got 'a100'"):
        device_named("a100")
    assert Assumed().tokens_per_step == 2.85


def test_help_needs_no_torch() -> None:
    program = "import sys, twotower.commands.arguments; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "False"
