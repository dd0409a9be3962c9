"""Our Helm chart as Helm renders it, and what Helm says against bad values."""

import os
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

from scripts import chart
from tests.deploy.rendered import Rendered

VALUES = sorted(path.stem for path in (chart.CHART / "values").glob("*.yaml"))


def require_helm() -> str:
    """Helm's path. Skips where it is absent; fails there when REQUIRE_ALL=1."""
    return require(chart.helm(), "helm")


def require(path: str | Path | None, name: str) -> str:
    if path is None or not Path(path).exists():
        missing(f"no {name} here; `make deploy-env` brings one")
    return str(path)


def missing(message: str) -> NoReturn:
    """Skips; fails when REQUIRE_ALL=1."""
    if os.environ.get("REQUIRE_ALL") == "1":
        pytest.fail(message)
    pytest.skip(message)


@cache
def rendered(values: str, *options: str) -> Rendered:
    """The chart with one of its values files, and more options of Helm's."""
    require_helm()
    made = chart.template(values, *options)
    assert made.returncode == 0, made.stderr
    return Rendered.read(made.stdout)


def refusal(values: str, *options: str, release: str = chart.RELEASE) -> str:
    """What Helm says, having refused."""
    require_helm()
    made = chart.template(values, *options, release=release)
    assert made.returncode != 0, f"taken: {options}"
    return made.stderr
