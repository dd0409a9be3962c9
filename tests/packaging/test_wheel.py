"""The wheel holds `twotower` alone, with its data; the build runs offline, through the backend itself."""

import zipfile
from pathlib import Path

import pytest
from hatchling import build

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = build.build_wheel(str(folder))
    return set(zipfile.ZipFile(folder / name).namelist())


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
