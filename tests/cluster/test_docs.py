"""docs/parameters.md tells the limits that validation has."""

from pathlib import Path

import pytest

from cluster.completions import MAX_LABEL, MAX_PROMPTS
from twotower.core import DecodingParams
from twotower.decoding.token_bytes import NORMAL_FORMS, UNKNOWN
from twotower.engine.ledger import MAX_PASSED
from twotower.strict_json import MAX_NAMES
from twotower.validation import (
    MAX_BLOCK,
    MAX_COUNT,
    MAX_PRIORITY,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
    MIN_PRIORITY,
)

DOCS = Path(__file__).parents[2] / "docs"


def _rows() -> dict[str, list[str]]:
    lines = (DOCS / "parameters.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].split("`")[1]: row for row in rows}


def test_every_parameter_is_told_with_its_default() -> None:
    rows = _rows()
    assert rows.keys() == {*DecodingParams.__dataclass_fields__, "stop", "priority"}
    for name in ("max_new_tokens", "block_size", "steps_per_block", "confidence_threshold", "temperature"):
        assert float(rows[name][2]) == getattr(DecodingParams(), name)


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("block_size", f"1–{MAX_BLOCK}"),
        ("steps_per_block", f"1–{MAX_BLOCK}"),
        ("temperature", f"0–{MAX_TEMPERATURE}"),
        ("confidence_threshold", "0–1"),
        ("stop", f"up to {MAX_STOP_STRINGS} strings of 1–{MAX_STOP_CHARACTERS} characters"),
        ("stop_token_ids", f"up to {MAX_STOP_TOKEN_IDS} token ids"),
        ("max_new_tokens", "1 – 2³¹−1"),
        ("top_k", "0 – 2³¹−1"),
        ("seed", "0 – 2⁶³−1"),
        ("priority", "−2³¹ – 2³¹−1"),
    ],
)
def test_limits(name: str, allowed: str) -> None:
    assert (MAX_SEED, MAX_COUNT) == (2**63 - 1, 2**31 - 1)
    assert (MIN_PRIORITY, MAX_PRIORITY) == (-(2**31), 2**31 - 1)
    assert _rows()[name][3] == allowed


@pytest.mark.parametrize(
    ("what", "most"),
    [
        ("names of one JSON object", f"{MAX_NAMES}"),
        ("prompts of one call (HTTP)", f"{MAX_PROMPTS}"),
        ("stop strings", f"{MAX_STOP_STRINGS}, of {MAX_STOP_CHARACTERS} characters each"),
        ("`stop_token_ids`", f"{MAX_STOP_TOKEN_IDS}; one twice is one"),
        ("`model`, `user`", f"{MAX_LABEL} characters"),
    ],
)
def test_bounds(what: str, most: str) -> None:
    assert f"\n| {what} | {most} |" in (DOCS / "limits.md").read_text(encoding="utf-8")


def test_the_factors_of_a_prompt_s_bytes() -> None:
    text = (DOCS / "limits.md").read_text(encoding="utf-8")
    assert (NORMAL_FORMS, UNKNOWN) == (4, 16) and "four times as loose" in text and "sixteen times is taken" in text


def test_how_often_a_request_is_passed() -> None:
    assert f"at most {MAX_PASSED} others past" in (DOCS / "parameters.md").read_text(encoding="utf-8")
