"""The GPU benchmark on a CPU: every section runs on a tiny model, and what it measures with is right."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import main
from benchmarks.gpu_parts import pages
from benchmarks.gpu_parts.passes import AR_STEP, COMMIT, DENOISE, Bench, Kind
from benchmarks.gpu_parts.site import FULL, Site
from tests.cuda_stand_in import gpus
from tests.flash_stand_ins import FlashStandIns
from twotower.model.kernels import choose, paged_attention
from twotower.model.tower import ContextTower, DenoiserTower


@pytest.fixture(scope="module")
def bench() -> Bench:
    with torch.inference_mode():
        return Bench(Site.of("cpu", True, None))


@pytest.mark.parametrize("section", ["passes", "pages", pytest.param("exchange", marks=pytest.mark.slow)])
def test_a_section_alone(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    output = tmp_path / "new" / "report.md"
    assert main(["--tiny", "--sections", section, "--output", str(output)]) == 0
    report = output.read_text()
    assert "no time in it means anything" in report
    assert f"--sections {section}" in report
    assert "every number that was checked is right" in report
    if section == "passes":
        rows = [line for line in report.splitlines() if line.startswith(("| denoiser step", "| commit", "| AR step"))]
        assert len(rows) == 3 * 2
        assert "Error" not in report
    elif section == "pages":
        assert "both columns gather" in report and "attention in pages: none, pages are gathered (no CUDA)" in report
    else:
        assert "Checked on the device: every element as sent." in report
        assert "the context side is gone" in report
        assert "3 of 3 mirror slots free again" in report
        assert "first delta after" in report
        assert "the denoiser side is gone" in report


def test_pages_in_place_are_held_to_gathered_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over flash-attn's stand-in, with a GPU's pages. A kernel that is off is a fault."""
    monkeypatch.setattr(pages, "page_tokens_on", lambda kind: 256)
    monkeypatch.setattr("twotower.model.cache.page_tokens_on", lambda kind: 256)
    arguments = ["--tiny", "--sections", "pages", "--batches", "3", "--output", str(tmp_path / "report.md")]
    attend = paged_attention.attention(paged_attention.flash_attn(FlashStandIns(any_dtype=True).load("flash_attn")))
    for by, status in ((1.0, 0), (1.1, 1)):
        kernel = lambda q, seen, by=by: by * attend(q, seen)  # noqa: E731
        monkeypatch.setattr(
            pages, "choose", lambda *given, kernel=kernel: replace(choose(*given), attend_in_pages=kernel)
        )
        assert main(arguments) == status
        report = (tmp_path / "report.md").read_text()
        assert report.count("| denoiser step | 300 | 3 |") == 1 and "both columns gather" not in report
    assert "AR step of 3 rows behind 40: pages in place are off by 1.0e-01" in capsys.readouterr().err


@pytest.mark.slow
def test_passes_on_a_gpu_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last call, on the second GPU: captures, replays, marks and uploads are all that GPU's."""
    output = tmp_path / "report.md"
    with gpus(2, monkeypatch) as machine:
        for name in ("empty_cache", "reset_peak_memory_stats", "max_memory_allocated", "set_sync_debug_mode"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
        arguments = ["--tiny", "--device", "cuda:1", "--sections", "passes,pages", "--batches", "1,3"]
        assert main([*arguments, "--output", str(output)]) == 0
    report = output.read_text()
    passes, _, in_place = report.partition("## Passes")[2].partition("## Pages in place")
    assert "every number that was checked is right" in report and "Error" not in passes
    assert in_place.count("| denoiser step |") == 2 * 2 and "both columns gather" in in_place
    assert "`graph` means captured graphs" in report and "| unmask | 0 |" in report
    assert machine.captures == 3 * 2 and machine.replays > machine.captures
    assert machine.foreign_uploads == 0 and {device.index for device in machine.streams} == {1}


def test_a_captured_pass_that_is_off_is_a_fault(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.inference_mode():
        assert bench.graph_off(COMMIT, 3) <= 1e-4 and bench.graph_off(DENOISE, 1) <= 1e-4
    graph = Bench.graph
    monkeypatch.setattr(
        Bench, "graph", lambda self, kind, rows: graph(self, kind, rows) * (1.0 if kind is not COMMIT else 1.1)
    )
    arguments = ["--tiny", "--sections", "passes", "--batches", "1", "--output", str(tmp_path / "report.md")]
    assert main(arguments) == 1
    assert "commit of 1 rows: the captured pass is off by 1.0e-01" in capsys.readouterr().err
    assert (tmp_path / "report.md").read_text().count("the captured pass is off") == 1


def test_a_captured_pass_that_leaves_a_nan_in_a_state_is_off(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Bench.graph

    def sick(self: Bench, kind: Kind, rows: int) -> torch.Tensor:
        out = graph(self, kind, rows)
        self.cache.ssm[:, self.slots[0]] = math.nan
        return out

    monkeypatch.setattr(Bench, "graph", sick)
    with torch.inference_mode():
        assert math.isnan(bench.graph_off(COMMIT, 1))
        assert bool(torch.isfinite(bench.cache.ssm).all()), "the states are as before"


@pytest.mark.slow
def test_parity_of_the_cpu_with_itself(tmp_path: Path) -> None:
    output = tmp_path / "report.md"
    assert main(["--tiny", "--sections", "parity", "--output", str(output)]) == 0
    report = output.read_text()
    assert "MORE than" not in report
    assert "NOT FINITE" not in report
    assert report.count("cpu float32 auto | 49 of 49") == 2


def test_a_section_that_breaks_does_not_take_the_others_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(site: Site, report: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(main.__globals__["SECTIONS"], "parity", broken)
    output = tmp_path / "report.md"
    assert main(["--tiny", "--sections", "parity,passes", "--batches", "1", "--output", str(output)]) == 1
    report = output.read_text()
    assert "## parity BROKE\n\n`RuntimeError: no kernel image`" in report
    assert "## Passes" in report


@pytest.mark.parametrize("arguments", [["--sections", "speed"], ["--batches", "0"], ["--batches", "1,x"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "got" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "--tiny runs on the CPU" in capsys.readouterr().err


def test_the_full_size_is_the_released_one() -> None:
    with torch.device("meta"):
        towers = ContextTower(FULL), DenoiserTower(FULL)
    parameters = sum(p.numel() for tower in towers for p in tower.parameters())
    assert round(parameters / 1e9, 1) == 63.2


@pytest.mark.slow
@torch.inference_mode()
def test_eager_and_fixed_passes_agree(bench: Bench) -> None:
    conv, ssm = bench.cache.conv.clone(), bench.cache.ssm.clone()
    for kind in (DENOISE, COMMIT, AR_STEP):
        fixed = bench.graph(kind, 3).clone()
        bench.cache.conv.copy_(conv)
        bench.cache.ssm.copy_(ssm)
        torch.testing.assert_close(fixed, bench.eager(kind, 3), rtol=0, atol=1e-4)
        bench.cache.conv.copy_(conv)
        bench.cache.ssm.copy_(ssm)


@torch.inference_mode()
def test_experts_are_counted_per_layer_and_their_bytes_once(bench: Bench) -> None:
    one, many = bench.experts(AR_STEP, 1), bench.experts(DENOISE, 3)
    layers = bench.site.config.hybrid_override_pattern.count("E")
    assert one == [bench.site.config.num_experts_per_tok] * layers
    assert len(many) == layers
    assert max(many) <= bench.site.config.n_routed_experts
    per_expert = 2 * bench.site.config.hidden_size * bench.site.config.moe_intermediate_size * 4
    difference = bench.moved_bytes(COMMIT, 1, [3] * layers) - bench.moved_bytes(COMMIT, 1, [2] * layers)
    assert difference == layers * per_expert
