"""Our four top-level names belong to this checkout: nobody else installs them, and they import from anywhere."""

import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = pytest.mark.parametrize("name", ["twotower", "actors", "cluster", "twotower_client"])


@NAMES
def test_no_other_distribution_provides(name: str) -> None:
    owners = set(packages_distributions().get(name, [])) - {"twotower", "twotower-client"}
    assert not owners, f"{sorted(owners)} also installs the top-level name {name!r}; the two overwrite each other"


@NAMES
def test_imports_this_checkout_from_anywhere(name: str, tmp_path: Path) -> None:
    report = f"import {name}; print(*{name}.__path__)"
    found = subprocess.run([sys.executable, "-c", report], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == ROOT / name
