"""docs/parameters.md tells the limits that validation has."""

import importlib
from pathlib import Path

import pytest

from cluster.config import ServiceConfig
from cluster.faces.grpc.strict_protobuf import MAX_FIELDS
from cluster.faces.http.chat_messages import MAX_MESSAGES, MAX_PARTS
from cluster.faces.http.completion_models import MAX_LABEL
from cluster.runs.choices import MAX_PROMPTS
from twotower.core import (
    MAX_BLOCK,
    MAX_COUNT,
    MAX_PRIORITY,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
    MIN_PRIORITY,
    DecodingParams,
)
from twotower.engine.ledger import MAX_PASSED
from twotower.json_reader import MAX_VALUES
from twotower.strict_json import MAX_NAMES
from twotower.text.chat_template import RENDERED_S
from twotower.text.token_bytes import NORMAL_FORMS, UNKNOWN

DOCS = Path(__file__).parents[2] / "docs"


def _rows() -> dict[str, list[str]]:
    lines = (DOCS / "parameters.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].split("`")[1]: row for row in rows}


def test_every_parameter_is_told_with_its_default() -> None:
    rows = _rows()
    assert rows.keys() == {*DecodingParams.__dataclass_fields__, "stop", "priority", "trace", "logprobs"}
    for name in ("max_new_tokens", "block_size", "steps_per_block", "confidence_threshold", "temperature"):
        assert float(rows[name][3]) == getattr(DecodingParams(), name)


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
    assert _rows()[name][4] == allowed


@pytest.mark.parametrize(
    ("what", "most"),
    [
        ("names of one JSON object", f"{MAX_NAMES}"),
        ("values of a JSON text beside the numbers in its arrays", f"{MAX_VALUES}"),
        ("prompts of one call (HTTP)", f"{MAX_PROMPTS}"),
        ("gRPC: fields of a message, each string of a list counted", f"{MAX_FIELDS}"),
        ("stop strings", f"{MAX_STOP_STRINGS}, of {MAX_STOP_CHARACTERS} characters each"),
        ("`stop_token_ids`", f"{MAX_STOP_TOKEN_IDS}; one twice is one"),
        ("`model`, `user`, `name` of a message, `safety_identifier`, `prompt_cache_key`", f"{MAX_LABEL} characters"),
        ("messages of a chat; over gRPC counted before they are read", f"{MAX_MESSAGES:,}"),
        ("parts of a message", f"{MAX_PARTS:,}"),
        ("processor time that a chat template takes", f"{RENDERED_S:g} s"),
        ("answers of one call: `n` or `best_of`, times its prompts", f"{MAX_PROMPTS}"),
    ],
)
def test_bounds(what: str, most: str) -> None:
    assert f"\n| {what} | {most} |" in (DOCS / "limits.md").read_text(encoding="utf-8")


def test_the_factors_of_a_prompt_s_bytes() -> None:
    text = (DOCS / "limits.md").read_text(encoding="utf-8")
    assert (NORMAL_FORMS, UNKNOWN) == (4, 16) and "four times as loose" in text and "sixteen times is taken" in text


def test_how_often_a_request_is_passed() -> None:
    assert f"at most {MAX_PASSED} others past" in (DOCS / "parameters.md").read_text(encoding="utf-8")


def test_every_setting_has_a_row() -> None:
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    for section, settings in ServiceConfig():
        rows = text.partition(f"## `{section}`\n")[2].partition("\n## ")[0]
        assert all(f"\n| `{name}` | " in rows for name, _ in settings)


def test_the_generated_tables_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make docs` writes them."""
    monkeypatch.syspath_prepend(str(DOCS.parent / "scripts"))
    tables = importlib.import_module("tables")
    assert [path.name for path in tables.stale()] == []
    text = (DOCS / "parameters.md").read_text(encoding="utf-8")
    assert tables.written(text.replace("| 0–1000 |", "| 0–999 |"), {"parameters": tables.parameters()}) == text
