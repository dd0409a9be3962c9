"""Two runs side by side, from the JSON that they wrote."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower.commands.bench.report import FORMAT
from twotower.errors import ConfigError

# The compared figures: name, place in the JSON, factor for display.
_ROWS = (
    ("tokens/s", ("tokens_per_s", "mean"), 1),
    ("requests/s", ("requests_per_s", "mean"), 1),
    ("first tokens, p50 ms", ("first_token", "p50"), 1000),
    ("first tokens, p99 ms", ("first_token", "p99"), 1000),
    ("between blocks, p50 ms", ("between_blocks", "p50"), 1000),
    ("latency, p50 ms", ("latency", "p50"), 1000),
    ("latency, p90 ms", ("latency", "p90"), 1000),
    ("latency, p99 ms", ("latency", "p99"), 1000),
    ("tokens/step", ("tokens_per_step",), 1),
    ("accepted/round", ("accepted_per_round",), 1),
)
# Parts of the plan: if these differ, the two runs did not measure the same thing.
_SAME = ("loads", "modes", "params", "rounds", "warm_up", "seed", "prompts", "family")


def read_run(path: Path) -> dict[str, Any]:
    """Raises ConfigError for a file that `bench` did not write."""
    try:
        told: Any = json.loads(path.read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise ConfigError(f"{path}: got format {told['format']!r}, wanted {FORMAT}")
        return {**told, "by": {(one["load"], one["mode"]): one for one in told["figures"]}}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path}: not what bench --output writes: {error!r:.100}") from None


def compared(a_path: Path, b_path: Path) -> str:
    """Markdown. Raises ConfigError."""
    a, b = read_run(a_path), read_run(b_path)
    lines = [f"A: {a_path} ({a['setting']['model']}, {a['setting']['versions']})"]
    lines += [f"B: {b_path} ({b['setting']['model']}, {b['setting']['versions']})"]
    different = [name for name in _SAME if a["plan"].get(name) != b["plan"].get(name)]
    different += [name for name in ("model", "load's machine") if _machine(a, name) != _machine(b, name)]
    if different:
        lines += ["", f"The two differ in more than what they measured: {', '.join(different)}."]
    both = [key for key in a["by"] if key in b["by"]]
    if not both:
        raise ConfigError(f"{a_path} and {b_path} have no load and mode in common")
    for key in both:
        lines += ["", f"{key[1]}, {key[0]}", "", "| | A | B | B ÷ A | |", "|---|---|---|---|---|"]
        lines += _table(a["by"][key], b["by"][key])
    missing = [f"{mode}, {load}" for load, mode in (a["by"].keys() ^ b["by"].keys())]
    if missing:
        lines += ["", f"Only in one of them: {'; '.join(sorted(missing))}."]
    return "\n".join(lines)


def _table(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, path, factor in _ROWS:
        first, second = _at(a, path), _at(b, path)
        if first is None or second is None:
            continue
        ratio = f"{second / first:.2f}" if first else "–"
        rows.append(
            f"| {name} | {_shown(first * factor)} | {_shown(second * factor)} | {ratio} | {_note(a, b, path[0])} |"
        )
    failed = [f"{sum(one['errors'].values())} of {one['requests']}" for one in (a, b)]
    return [*rows, f"| failed | {failed[0]} | {failed[1]} | | |"]


def _note(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> str:
    """A note if the rounds of one run differ as much as the two runs."""
    if not isinstance(a[name], dict) or "low" not in a[name] or min(a["rounds"], b["rounds"]) < 2:
        return ""
    apart = a[name]["high"] < b[name]["low"] or b[name]["high"] < a[name]["low"]
    return "" if apart else "within the spread of rounds"


def _at(one: Any, path: tuple[str, ...]) -> float | None:
    for name in path:
        one = one[name] if one is not None else None
    return None if one is None else float(one)


def _shown(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _machine(run: Mapping[str, Any], name: str) -> str:
    """The machine's description without its load, which always differs."""
    return str(run["setting"][name]).partition(", load ")[0]
