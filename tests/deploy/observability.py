"""What deploy/observability/ holds, and all that its alerts and panels ask Prometheus."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DIRECTORY = Path(__file__).resolve().parents[2] / "deploy" / "observability"
ALERTS, DASHBOARD = DIRECTORY / "alerts.yaml", DIRECTORY / "dashboard.json"

Rule = dict[str, Any]
Panel = dict[str, Any]


def loaded(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)


RULES: list[Rule] = [rule for group in loaded(ALERTS)["groups"] for rule in group["rules"]]
PANELS: list[Panel] = [panel for panel in loaded(DASHBOARD)["panels"] if panel["type"] != "row"]


def panel_queries(model: str = "$model", window: str = "$__rate_interval") -> Iterator[tuple[str, str]]:
    """(title, query) of each; with a model and a window the query is as Grafana sends it."""
    for panel in PANELS:
        for target in panel["targets"]:
            query = target["expr"].replace("$model", model).replace("$__rate_interval", window)
            yield panel["title"], query if model == "$model" else query.replace("$namespace", ".*")
