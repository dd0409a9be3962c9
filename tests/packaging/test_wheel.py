"""The wheel holds `twotower` alone, with its data; the build runs offline, through the backend itself."""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from hatchling import build
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


# As the script that pip makes of an entry point, with nothing in reach but the wheel and what it says it needs.
USE = """
import importlib.abc, importlib.metadata, sys
class Lacking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {lacking}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Lacking())
sys.path[:] = [{wheel!r}, *(place for place in sys.path if place not in ("", {root!r}))]
[here] = [one for one in importlib.metadata.distributions(path=[{wheel!r}]) if one.name == "twotower"]
[command] = [one for one in here.entry_points if one.group == "console_scripts"]
run = command.load()
import twotower
assert twotower.__file__.startswith({wheel!r}), twotower.__file__
sys.argv[0] = command.name
sys.exit(run())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return folder / build.build_wheel(str(folder))


@pytest.fixture(scope="module")
def wheel_files(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_holds_twotower_alone(wheel_files: set[str]) -> None:
    top_level = {name.split("/")[0] for name in wheel_files}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"twotower"}


def test_holds_every_file_of_the_library(wheel_files: set[str]) -> None:
    kinds = {".json", ".py", ".pyi", ".safetensors", ".typed"}
    library = (path for path in (ROOT / "twotower").rglob("*") if path.suffix in kinds)
    assert {path.relative_to(ROOT).as_posix() for path in library} <= wheel_files


@pytest.mark.parametrize("data", ["twotower/py.typed", "twotower/demo/checkpoint/config.json"])
def test_holds_data(wheel_files: set[str], data: str) -> None:
    assert data in wheel_files


def test_holds_its_license(wheel_files: set[str]) -> None:
    [name] = [name for name in wheel_files if name.endswith(".dist-info/licenses/LICENSE")]
    assert name.startswith("twotower-")
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "The TwoTower Serve authors" in text
    ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert "!LICENSE" in ignored, "the image's build reads it"


def _needed(name: str, known: set[str]) -> set[str]:
    """A distribution and all that it needs here, without extras."""
    if name in known:
        return known
    known.add(name)
    for line in requires(name) or ():
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            _needed(canonicalize_name(wanted.name), known)
    return known


def test_with_what_it_says_it_needs_it_gives_the_command(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    told = [path.read_text(encoding="utf-8") for path in tmp_path.glob("*.dist-info/METADATA")]
    lines = re.findall(r"^Requires-Dist: (.+)$", told[0], re.MULTILINE)
    needed: set[str] = set()
    for wanted in map(Requirement, lines):
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            _needed(canonicalize_name(wanted.name), needed)
    lacking = {
        module
        for module, names in packages_distributions().items()
        if module != "twotower" and needed.isdisjoint(map(canonicalize_name, names))
    }
    assert {"ray", "grpc", "fastapi", "psutil", "llguidance"} <= lacking
    use = USE.format(lacking=sorted(lacking), wheel=str(tmp_path), root=str(ROOT))
    flags = ["generate", "--checkpoint", "demo", "--prompt", "words: 2009\n", "--max-new-tokens", "32"]
    done = subprocess.run([sys.executable, "-c", use, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "two thousand and nine"), done.stderr
