"""`benchmarks.quantised`: what it measures is of the format it names, and its files are named by the weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quantised
from benchmarks.quantised import Held, Row, render
from benchmarks.reference.workload import DEMO
from twotower.demo.scores import AR
from twotower.expert_formats import ExpertFormat


@pytest.mark.slow
def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(quantised, "WAYS", (AR,))
    monkeypatch.setattr(quantised, "_likelihoods", _none)
    monkeypatch.setattr(quantised, "families_of", lambda _: ("roman",))
    monkeypatch.setattr("twotower.demo.evaluate.families_of", lambda _: ("roman",))
    output = tmp_path / "quantised"
    assert quantised.main(["--num-instances", "1", "--formats", "int4:16", "--output", str(output)]) == 0
    sha = hashlib.sha256((DEMO / "model.safetensors").read_bytes()).hexdigest()[:12]
    told = json.loads((tmp_path / f"quantised_{sha}.json").read_text())
    first = told["rows"][0]
    assert (first["experts"], first["way"], first["same"]) == ("fp32", "ar", 1.0)
    assert [held["experts"] for held in told["held"]] == ["fp32", "int4, groups of 16"]
    assert 0.03 < told["held"][1]["weights_off"] < 0.12
    assert told["held"][1]["nbytes"] * 6.4 == pytest.approx(told["held"][0]["nbytes"])
    assert f"quantised_{sha}.md" in capsys.readouterr().out


async def _none(*_: object) -> None:
    return None


def test_the_report() -> None:
    text = render({"commit": "abc"}, [Row("int8", "ar", 0.5, 1.0, 0.25)], [Held("int8", 2_000_000, 0.005, None)])
    assert "| int8 | ar | 50.0 % | 1.000 | 25.0 % |" in text and "| int8 | 2.00 | 0.50 % | – |" in text


@pytest.mark.parametrize("asked", ["int5", "int4:24", "int8:16", "stored", "int4:x"])
def test_formats_that_are_refused(asked: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        quantised.main(["--formats", asked])
    assert ended.value.code == 2 and "wanted int8 or int4:GROUP" in capsys.readouterr().err


def test_formats_that_do_not_fit_the_checkpoint(capsys: Any) -> None:
    assert quantised.main(["--formats", "int4:64"]) == 2
    assert "groups of 64 do not divide 48" in capsys.readouterr().err
    assert quantised._formats(quantised._parser().parse_args([])) == [ExpertFormat(8), ExpertFormat(4, 16)]
