"""The dashboard: it asks for what is declared, and shows all of it."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

from tests.deploy.observability import DASHBOARD, PANELS, Panel, loaded, panel_queries
from tests.deploy.promql import grouped_by, metrics, problems, selectors
from tests.prometheus import promtool

ROOT = Path(__file__).resolve().parents[2]
WHOLE = loaded(DASHBOARD)
EACH = pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
# Names of Grafana's units; one that it does not know is shown as text after the number.
UNITS = {"short", "s", "bytes", "Bps", "percentunit", "reqps"}


def test_it_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make docs` writes it."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    assert importlib.import_module("dashboard").dashboard() == DASHBOARD.read_text(encoding="utf-8")


@EACH
def test_a_panel(panel: Panel) -> None:
    assert panel["targets"] and panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        query, legend = target["expr"], target["legendFormat"]
        assert list(problems(query)) == []
        for selector in selectors(query):
            assert {("model_name", "=~", "$model"), ("namespace", "=~", "$namespace")} <= {*selector.matchers}
            assert f"`{re.sub('_bucket$', '', selector.name)}`" in panel["description"]
        assert set(re.findall(r"{{(\w+)}}", legend)) == grouped_by(query) - {"le"} or panel["type"] == "stat"


def test_every_metric_is_shown() -> None:
    """Or those who look for it would have to know its name."""
    shown = {selector.name for _, query in panel_queries() for selector in selectors(query)}
    declared = metrics()
    assert {declared[name].name for name in shown} == {metric.name for metric in declared.values()}


def test_panels_have_places_of_their_own() -> None:
    taken = set()
    for panel in WHOLE["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in WHOLE["panels"]}) == len(WHOLE["panels"])
    assert {variable["name"] for variable in WHOLE["templating"]["list"]} == {"source", "namespace", "model"}


def test_prometheus_takes_the_queries(tmp_path: Path) -> None:
    queries = [query for _, query in panel_queries(window="1m")]
    queries += [mark["expr"] for mark in WHOLE["annotations"]["list"]]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    good, said = promtool("check", "rules", str(tmp_path / "queries.yaml"))
    assert good and f"{len(queries)} rules found" in said, said
