"""The image: its locks are what pyproject.toml asks for, its targets agree with the chart, and no CUDA gets into the
one for CPUs. Nothing is built here."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from scripts import chart
from tests.deploy.chart import require
from tests.deploy.rendered import Rendered

ROOT = chart.ROOT
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
TARGETS = ("cpu", "gpu")
_LINE = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")
_OF_CUDA = re.compile(r"(nvidia|cuda)-.+|triton|torch")


def _lock(name: str) -> dict[str, str]:
    """Versions by package: each with one digest."""
    head, *lines = (ROOT / "deploy" / "locks" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert head.startswith("# Made by scripts/lock.py")
    found = [_LINE.fullmatch(line) for line in lines]
    assert None not in found
    return {match[1]: match[2] for match in found if match}


def _stages() -> dict[str, str]:
    """The Dockerfile's instructions by stage, comments and line ends taken out."""
    text = "\n".join(line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    parts = re.split(r"^FROM (\S+) AS (\w+)$", text.replace("\\\n", ""), flags=re.MULTILINE)
    return {
        "": parts[0],
        **{name: f"{image}\n{body}" for image, name, body in zip(*[iter(parts[1:])] * 3, strict=True)},
    }


@pytest.mark.parametrize("target", TARGETS)
def test_the_lock_has_what_the_project_asks_for(target: str) -> None:
    """Run scripts/lock.py after a change of pyproject.toml."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras, locked = told["optional-dependencies"], _lock(target)
    wanted = [Requirement(line) for line in (*told["dependencies"], *extras["serve"], *extras["otel"])]
    missing = [
        str(requirement)
        for requirement in wanted
        if not (target == "cpu" and requirement.name == "torch")
        and not requirement.specifier.contains(locked.get(requirement.name.lower(), "0"))
    ]
    assert not missing


def test_the_two_images_differ_by_cuda_alone() -> None:
    cpu, gpu = _lock("cpu"), _lock("gpu")
    assert cpu == {name: version for name, version in gpu.items() if name in cpu}
    assert all(_OF_CUDA.fullmatch(name) for name in gpu.keys() - cpu.keys() - {"einops"})
    assert not [name for name in cpu if _OF_CUDA.fullmatch(name)]


def test_versions_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from environment import TORCH_VERSION
    from kernels_env import SOURCES

    stages, gpu = _stages(), _lock("gpu")
    assert gpu["torch"] == TORCH_VERSION
    assert f"torch=={TORCH_VERSION}+cpu" in stages["cpu"]
    assert {f"{name}=={version}" for name, version in _lock("kernels").items()} == set(SOURCES)
    cuda = ".".join(gpu["nvidia-cuda-runtime"].split(".")[:2])
    assert f"CUDA_IMAGE=nvidia/cuda:{cuda}." in stages[""]
    assert "PYTHON_IMAGE=python:3.12." in stages[""] and "python3.12-dev" in stages["kernels"]
    assert yaml.safe_load((chart.CHART / "values.yaml").read_text())["rayVersion"] == gpu["ray"]


def test_everything_that_is_installed_is_pinned() -> None:
    installs = re.findall(r"pip (?:install|wheel) [^&\n]*", "".join(_stages().values()))
    assert len(installs) == 6
    for install in installs:
        assert "--no-deps" in install
        assert "--require-hashes" in install or "torch==" in install or "/wheels/*.whl" in install


def test_the_user_is_the_pods() -> None:
    made = Rendered.load(ROOT / "deploy" / "kuberay" / "rayservice.yaml")
    security = made.cells.pod["securityContext"]
    for target in TARGETS:
        assert f"USER {security['runAsUser']}:{security['runAsGroup']}\n" in _stages()[target]


def test_what_is_copied_is_let_in() -> None:
    ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert ignored[0] == "**" and all((ROOT / path).exists() for path in let_in)
    copied = re.findall(r"(?:(?<=\s)|^)deploy/\S+", "".join(_stages().values()))
    assert copied and all(any(Path(path).is_relative_to(allowed) for allowed in let_in) for path in copied)


def test_a_compiler_is_left_for_triton_and_the_kernels_are_tried() -> None:
    gpu = _stages()["gpu"]
    assert " gcc libc6-dev" in gpu
    assert all(module in gpu for module in ("causal_conv1d_cuda", "flash_attn_2_cuda", "selective_scan_cuda"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "version"), [("nvidia-cublas", "13.1"), ("triton", "3.7"), ("torch", "2.13.0")])
def test_cuda_in_the_image_for_cpus_fails_its_build(name: str, version: str, tmp_path: Path) -> None:
    assert "python /opt/image/prove_cpu.py" in _stages()["cpu"]
    _install(tmp_path, "torch", "2.13.0+cpu")
    proof = [sys.executable, "-S", str(ROOT / "deploy" / "prove_cpu.py")]  # without this environment's own packages
    environment = {"PYTHONPATH": str(tmp_path)}
    assert subprocess.run(proof, env=environment).returncode == 0
    _install(tmp_path, name, version)
    proved = subprocess.run(proof, env=environment, capture_output=True, text=True)
    assert proved.returncode == 1 and f"got {name} {version} in the image" in proved.stderr


def _install(directory: Path, name: str, version: str) -> None:
    record = directory / f"{name.replace('-', '_')}.dist-info"
    record.mkdir(exist_ok=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.slow
def test_hadolint_finds_nothing() -> None:
    hadolint = require(shutil.which("hadolint", path=str(chart.TOOLS)) or shutil.which("hadolint"), "hadolint")
    linted = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr
