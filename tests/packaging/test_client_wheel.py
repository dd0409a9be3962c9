"""The client is a distribution of its own: light, and without any of ours."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling import build

ROOT = Path(__file__).parents[2]
# Whatever the client loads, none of these: neither heavy nor of the service.
BLOCKED = ("torch", "ray", "numpy", "transformers", "pydantic", "fastapi", "twotower", "actors", "cluster")
USE = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv[1])
import asyncio
from twotower_client import AsyncClient, Client, RetryPolicy, Unavailable
assert "grpc" not in sys.modules and "httpx2" not in sys.modules
once = RetryPolicy(attempts=1)
for url in ("grpc://127.0.0.1:1", "http://127.0.0.1:1"):
    with Client(url, retry=once) as client:
        assert not client.ready().ready
        try:
            client.complete("a", mode="ar", seed=1, stop_token_ids=[2], timeout_s=20)
        except Unavailable:
            pass
    async def ask():
        async with AsyncClient(url, retry=once) as client:
            try:
                await client.complete([1, 2], timeout_s=20)
            except Unavailable:
                pass
    asyncio.run(ask())
import twotower_client
print(twotower_client.__file__)
assert not {{name.partition(".")[0] for name in sys.modules}} & set({BLOCKED!r})
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT / "twotower_client")
        return folder / build.build_wheel(str(folder))


@pytest.mark.slow
def test_holds_the_client_alone(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    kinds = {".py", ".pyi", ".binpb", ".typed"}
    ours = {path for path in (ROOT / "twotower_client").rglob("*") if path.suffix in kinds}
    assert packed == {path.relative_to(ROOT).as_posix() for path in ours}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 100_000


@pytest.mark.slow
def test_its_dependencies_are_light(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    wanted = re.findall(r"^Requires-Dist: ([\w-]+)", archive.read(name).decode(), re.MULTILINE)
    assert sorted(wanted) == ["googleapis-common-protos", "grpcio", "httpcore2", "httpx2", "protobuf"]


@pytest.mark.slow
def test_it_is_used_without_torch_ray_or_the_service(wheel: Path, tmp_path: Path) -> None:
    """As installed: from its wheel's files, with everything else of ours out of reach."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    used = [sys.executable, "-c", USE, str(tmp_path)]
    done = subprocess.run(used, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_versions_agree() -> None:
    import tomllib

    import twotower
    import twotower_client

    told = tomllib.loads((ROOT / "twotower_client" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert told["version"] == twotower_client.__version__ == twotower.__version__
