"""The alerts: they ask for what is declared, each has its page for the operator."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

from tests.deploy.observability import ALERTS, RULES, Rule, loaded
from tests.deploy.promql import grouped_by, groupings, problems

ROOT = Path(__file__).resolve().parents[2]
EACH = pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])


def test_there_are_some_and_each_has_a_name_of_its_own() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names) > 12
    assert all(re.fullmatch(r"TwoTower[A-Z]\w+", name) for name in names)


@EACH
def test_it_asks_for_what_is_declared(rule: Rule) -> None:
    assert list(problems(rule["expr"])) == []


@EACH
def test_services_are_kept_apart(rule: Rule) -> None:
    """Each sum is by model and namespace, so that one service's alert does not hide another's."""
    sums = [labels for labels in groupings(rule["expr"]) if labels]
    assert sums and all({"namespace", "model_name"} <= labels for labels in sums)


@EACH
def test_what_an_operator_is_told(rule: Rule) -> None:
    assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"].keys() == {"severity"} and rule["labels"]["severity"] in ("critical", "warning")
    told = rule["annotations"]
    assert told.keys() == {"summary", "description", "runbook_url"}
    assert len(told["summary"]) < 120 and not told["summary"].endswith(".")
    assert 80 < len(told["description"]) < 400 and told["description"].endswith(".")
    # A label that the expression has lost would be an empty word.
    there = grouped_by(rule["expr"]) | ({"NodeAddress"} if rule["alert"] == "TwoTowerRouterCutOff" else set())
    named = re.findall(r"\$labels\.(\w+)", told["summary"] + told["description"])
    assert set(named) <= there


def _sections(document: str) -> dict[str, str]:
    """What is under each heading of the third rank, by the anchor that a reader's browser goes to."""
    parts = re.split(r"^### (.+)\n", (ROOT / document).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {_anchor(head): text.partition("\n## ")[0] for head, text in zip(parts[1::2], parts[2::2], strict=True)}


def _anchor(head: str) -> str:
    return re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")


@EACH
def test_the_runbook_says_what_to_do(rule: Rule) -> None:
    document, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert (document, anchor) == ("docs/operations.md", _anchor(rule["alert"]))
    section = _sections(document)[anchor]
    assert re.findall(r"^- \*\*(\w+(?: \w+)?):\*\* ", section, flags=re.MULTILINE) == ["Means", "Look at", "Do"]


def test_the_runbook_knows_no_other_alert() -> None:
    headed = {anchor for anchor in _sections("docs/operations.md") if anchor.startswith("twotower")}
    assert headed == {_anchor(rule["alert"]) for rule in RULES}


def test_the_resource_for_kubernetes_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make docs` writes it."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    observability = importlib.import_module("observability")
    assert [path.name for path in observability.stale()] == []
    resource = yaml.safe_load(observability.prometheus_rule())
    assert (resource["apiVersion"], resource["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert resource["spec"] == loaded(ALERTS)
