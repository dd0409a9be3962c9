"""docs/parameters.md tells the limits that validation has."""

from pathlib import Path

import pytest

from twotower.core import DecodingParams
from twotower.engine.ledger import MAX_PASSED
from twotower.validation import (
    MAX_BLOCK,
    MAX_PRIORITY,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
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
        ("seed", "0 – 2⁶³−1"),
        ("priority", "−2³¹ – 2³¹−1"),
    ],
)
def test_limits(name: str, allowed: str) -> None:
    assert MAX_SEED == 2**63 - 1
    assert (MIN_PRIORITY, MAX_PRIORITY) == (-(2**31), 2**31 - 1)
    assert _rows()[name][3] == allowed


def test_how_often_a_request_is_passed() -> None:
    assert f"at most {MAX_PASSED} others past" in (DOCS / "parameters.md").read_text(encoding="utf-8")
