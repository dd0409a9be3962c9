"""The alerts as Prometheus takes them: each fires when it is to, and not else. The cases are promtool's, in alerts/."""

from pathlib import Path

import pytest

from tests.deploy.observability import ALERTS, RULES, loaded
from tests.prometheus import promtool

UNIT_TESTS = sorted((Path(__file__).parent / "alerts").glob("*.yaml"))


def test_prometheus_takes_them() -> None:
    good, said = promtool("check", "rules", "--lint-fatal", str(ALERTS))
    assert good and f"{len(RULES)} rules found" in said, said


def test_each_is_seen_firing_and_quiet() -> None:
    """In the unit tests that promtool runs below."""
    seen = {
        (case["alertname"], bool(case["exp_alerts"]))
        for path in UNIT_TESTS
        for test in loaded(path)["tests"]
        for case in test["alert_rule_test"]
    }
    assert seen == {(rule["alert"], fires) for rule in RULES for fires in (True, False)}


@pytest.mark.slow
def test_they_fire_when_they_are_to() -> None:
    good, said = promtool("test", "rules", *map(str, UNIT_TESTS))
    assert good and said.count("SUCCESS") == len(UNIT_TESTS), said
