"""`python -m cluster generate --logprobs` and `--trace`, over scripted cells."""

import asyncio
import json
from typing import Any

import pytest

from cluster.cli.main import main
from tests.cluster.fakes import ScriptedCells, generation, grpc_server, tokens


async def _told(cells: ScriptedCells, *flags: str, with_tokenizer: bool = True) -> int:
    prompt = ["--prompt", "a"] if with_tokenizer else ["--prompt-token-ids", "5"]
    common = [*prompt, "--max-new-tokens", "6", "--timeout", "20", "--seed", "1"]
    async with grpc_server(generation(cells, with_tokenizer)) as (address, _):
        return await asyncio.to_thread(main, ["generate", *common, "--address", address, *flags])


async def _json(cells: ScriptedCells, capsys: pytest.CaptureFixture[str], *flags: str, **how: bool) -> Any:
    assert await _told(cells, "--json", *flags, **how) == 0
    return json.loads(capsys.readouterr().out)


async def test_the_numbers_as_json(cells: ScriptedCells, capsys: pytest.CaptureFixture[str]) -> None:
    result = await _json(cells, capsys, "--logprobs", "1", "--trace")
    assert result["text"] == "All go" and result["mode"] == "diffusion"
    first = result["logprobs"][0]
    assert first["token"] == "A" and first["log_prob"] == pytest.approx(-tokens("A")[0] / 100)
    assert first["top"] == [{"token_id": 4, "token": "\x00", "log_prob": pytest.approx(-0.04)}]
    assert first["confidence"] == 0.5 and [one["token"] for one in result["logprobs"]] == list("All go")
    [step, *_] = result["trace"]
    assert step["step"] == {
        "start": 0,
        "size": 4,
        "step": 0,
        "positions": [0, 2],
        "token_ids": list(tokens("Al")),
        "texts": ["A", "l"],
        "confidence": [0.5, 0.5],
    }
    assert not (await _json(cells, capsys)).keys() & {"logprobs", "trace"}


async def test_a_round_as_json(cells: ScriptedCells, capsys: pytest.CaptureFixture[str]) -> None:
    result = await _json(cells, capsys, "--mode", "verified", "--trace")
    [verdict, _] = [told["round"] for told in result["trace"] if "round" in told]
    assert (verdict["draft_texts"], verdict["num_accepted"], verdict["text"]) == (["A", "l", "l", "\x1f"], 3, " ")


async def test_without_a_tokenizer_tokens_have_their_ids(
    cells: ScriptedCells, capsys: pytest.CaptureFixture[str]
) -> None:
    result = await _json(cells, capsys, "--logprobs", "1", "--trace", with_tokenizer=False)
    token = tokens("A")[0]
    assert result["logprobs"][0]["token"] == f"token_id:{token}" and result["trace"][0]["step"]["texts"] == []
    assert await _told(cells, "--trace", with_tokenizer=False) == 0
    assert f"{{+‹{token}›+}}░" in capsys.readouterr().out


async def test_on_the_terminal(cells: ScriptedCells, capsys: pytest.CaptureFixture[str]) -> None:
    assert await _told(cells, "--logprobs", "0", "--trace") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "block at 0, 4 positions",
        "  step 0, 2 fixed, p ≥ 0.50   {+A+}░{+l+}░",
        "  step 1, 2 fixed, p ≥ 0.50   A{+l+}l{+ +}",
        "  committed, 4 tokens         All",
        "  log-prob        p  denoiser  token                       likeliest",
    ]
    assert lines[5].split() == ["-0.6900", "50.2%", "50.0%", "'A'"] and lines[-2:] == ["", "All go"]


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
async def test_a_trace_of_what_has_no_blocks_is_refused_by_name(
    mode: str, cells: ScriptedCells, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await _told(cells, "--mode", mode, "--trace") == 2
    assert f"trace: got True, but trace is not supported in {mode} mode" in capsys.readouterr().err
