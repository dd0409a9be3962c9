"""Writes what is made in deploy/observability/; with --check, only says whether it is up to date."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from dashboard import dashboard

DIRECTORY = Path(__file__).resolve().parent.parent / "deploy" / "observability"
_HEAD = """\
# alerts.yaml for Prometheus' operator, made by `make docs`. Many operators take only rules with a label of theirs, such
# as `release: NAME` of a Helm release: see `ruleSelector` of your Prometheus.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: twotower
  labels: {app.kubernetes.io/name: twotower}
spec:
"""


def prometheus_rule() -> str:
    """The alerts as a resource of Kubernetes: the same lines, under `spec`."""
    _, found, groups = (DIRECTORY / "alerts.yaml").read_text(encoding="utf-8").partition("\ngroups:\n")
    if not found:
        sys.exit("wanted the line `groups:` in alerts.yaml")
    lines = f"groups:\n{groups}".splitlines()
    return _HEAD + "".join(f"  {line}\n" if line else "\n" for line in lines)


MADE: Mapping[str, Callable[[], str]] = {"prometheusrule.yaml": prometheus_rule, "dashboard.json": dashboard}


def stale() -> dict[Path, str]:
    """The files that are not what they are made from, with what they should hold."""
    fresh = {DIRECTORY / name: make() for name, make in MADE.items()}
    return {path: text for path, text in fresh.items() if not path.exists() or path.read_text(encoding="utf-8") != text}


def main() -> None:
    found = stale()
    if found and "--check" in sys.argv[1:]:
        names = ", ".join(f"deploy/observability/{path.name}" for path in found)
        sys.exit(f"not what it is made from; run `make docs`: {names}")
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
