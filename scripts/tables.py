"""Writes the tables of docs/ that the code declares; with --check, only says whether they are up to date."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cluster.config import ServiceConfig
from cluster.faces.http.neutral_values import CHAT_NEUTRAL, NEUTRAL, Neutral
from cluster.watch import cell_metrics, router_metrics
from cluster.watch.metric import declared_in
from twotower.core import LOGPROBS, PARAMETERS, PRIORITY, STOP, TRACE

DOCS = Path(__file__).resolve().parent.parent / "docs"
MADE = "made by `make docs`"


def parameters() -> str:
    """The parameters of a request."""
    rows = []
    beside = {"stop": STOP, "priority": PRIORITY, "trace": TRACE, "logprobs": LOGPROBS}
    for name, parameter in {**PARAMETERS, **beside}.items():
        modes, http = ", ".join(parameter.modes) or "all", f"`{parameter.http}`"
        rows.append((f"`{name}`", http, modes, parameter.default_told, parameter.kind.allowed, parameter.meaning))
    return table(("name", "over HTTP", "modes", "default", "allowed", "meaning"), rows)


def neutral(fields: Mapping[str, Neutral]) -> str:
    """The fields of other APIs that are taken where they ask for nothing."""
    rows = []
    for name, field in fields.items():
        values = ", ".join(f"`{json.dumps(value)}`" for value in field.values) or "only `null`"
        rows.append((f"`{name}`", values, field.source))
    return table(("field", "taken at", "whose"), rows)


def settings() -> str:
    """The settings of a service, section by section, under what the code says of each section."""
    parts = []
    schemas = ServiceConfig.model_json_schema()["$defs"]
    for section, field in ServiceConfig.model_fields.items():
        kind: Any = field.annotation
        schema = schemas[kind.__name__]["properties"]
        rows = [(f"`{name}`", default_of(told), values_of(told), told["description"]) for name, told in schema.items()]
        about = inspect.cleandoc(kind.__doc__)
        parts.append(f"## `{section}`\n{about}\n\n{table(('setting', 'default', 'allowed', 'meaning'), rows)}")
    return "\n".join(parts)


def metrics(declared: Mapping[str, object]) -> str:
    """Every metric of a module: as Prometheus gets it."""
    rows = []
    for metric in declared_in(declared):
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
        rows.append((f"`{metric.shown_name}`", str(metric.kind), labels, metric.unit, metric.meaning))
    return table(("metric", "type", "labels", "unit", "meaning"), rows)


def decisions() -> str:
    """The decisions, by their files' first lines."""
    files = sorted((DOCS / "adr").glob("0*.md"))
    heads = [path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for path in files]
    return "".join(f"- [{head}]({path.name})\n" for head, path in zip(heads, files, strict=True))


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "adr/README.md": {"decisions": decisions},
    "api.md": {
        "neutral fields": partial(neutral, NEUTRAL),
        "neutral fields of chats": partial(neutral, CHAT_NEUTRAL),
    },
    "operations.md": {
        "metrics of routers": partial(metrics, vars(router_metrics)),
        "metrics of cells": partial(metrics, vars(cell_metrics)),
    },
    "parameters.md": {"parameters": parameters},
    "settings.md": {"settings": settings},
}


def default_of(schema: Mapping[str, Any]) -> str:
    default = schema.get("default") or schema.get("default", [])
    if default in (None, []):
        return "none"
    return f"`{default}`" if isinstance(default, str) else json.dumps(default).removesuffix(".0")


def values_of(schema: Mapping[str, Any]) -> str:
    """The values that a JSON Schema of ours takes, in words."""
    match schema:
        case {"anyOf": [inner, {"type": "null"}]}:
            return values_of(inner)
        case {"enum": words}:
            return ", ".join(f"`{word}`" for word in words)
        case {"type": "array", "items": item}:
            return f"a list, each {values_of(item)}"
        case {"type": "string", "pattern": pattern}:
            return f"text like `{pattern}`".replace("|", "\\|")
        case {"type": "string"}:
            return "text"
        case {"type": "boolean"}:
            return "true, false"
        case {"minimum": low, "maximum": high}:
            return f"{low}–{high}"
        case {"minimum": low}:
            return f"from {low}"
        case {"exclusiveMinimum": low, "maximum": high}:
            return f"above {low}, to {high}"
        case {"exclusiveMinimum": low}:
            return f"above {low}"
    raise ValueError(f"no words for {schema}")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(
        f"{'|'.join(['', *(f' {cell} ' if cell != '---' else cell for cell in line), ''])}\n" for line in lines
    )


def written(text: str, tables: Mapping[str, str]) -> str:
    """`text` with each table between its marks."""
    for name, rows in tables.items():
        begin, end = f"<!-- {name}: {MADE} -->\n", f"<!-- end of {name} -->\n"
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            sys.exit(f"wanted the lines {begin.strip()} and {end.strip()}")
        text = f"{before}{begin}{rows}{end}{after}"
    return text


def stale() -> dict[Path, str]:
    """The files whose tables are not what the code declares, with what they should hold."""
    texts = {DOCS / name: (DOCS / name).read_text(encoding="utf-8") for name in TABLES}
    fresh = {
        path: written(text, {mark: make() for mark, make in TABLES[path.relative_to(DOCS).as_posix()].items()})
        for path, text in texts.items()
    }
    return {path: text for path, text in fresh.items() if text != texts[path]}


def main() -> None:
    found = stale()
    if found and "--check" in sys.argv[1:]:
        names = ", ".join(f"docs/{path.relative_to(DOCS)}" for path in found)
        sys.exit(f"not what the code declares; run `make docs`: {names}")
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
