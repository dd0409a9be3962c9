"""The image for CPUs, built by buildah and asked for an answer: where there are buildah and the base image. `long`: the
build fetches some hundreds of megabytes."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from scripts import chart
from tests.deploy.chart import missing

DOCKERFILE = chart.ROOT / "deploy" / "Dockerfile"
_BASE = re.compile(r"^ARG PYTHON_IMAGE=(\S+)$", re.MULTILINE)
_FETCH_S, _BUILD_S, _RUN_S = 300, 2400, 300
_ASK = ["python", "-m", "twotower", "generate", "--checkpoint", "demo", "--prompt", "words: 2009\n"]

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(_FETCH_S + _BUILD_S + 3 * _RUN_S)]


def _buildah(*arguments: str, within_s: float) -> subprocess.CompletedProcess[str]:
    """In a chroot, which wants no runtime of containers and works within one."""
    given = {"BUILDAH_ISOLATION": "chroot"} | os.environ
    return subprocess.run(["buildah", *arguments], env=given, capture_output=True, text=True, timeout=within_s)


def _require_base() -> str:
    """The base image's name, fetched by now. PYTHON_IMAGE names another one, as of a registry that can be reached."""
    if shutil.which("buildah") is None:
        missing("no buildah here; Debian's package `buildah` brings one")
    [own] = _BASE.findall(DOCKERFILE.read_text(encoding="utf-8"))
    base = os.environ.get("PYTHON_IMAGE", str(own))
    try:
        fetched = _buildah("pull", "--policy", "missing", base, within_s=_FETCH_S)
        problem = fetched.stderr.strip() if fetched.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"not within {_FETCH_S} s"
    if problem:
        missing(f"the base image {base} cannot be had: {problem.splitlines()[-1]}")
    return base


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    """Of an image that was built from this checkout. Both are taken away again."""
    base = _require_base()
    image = f"localhost/twotower-test:{os.getpid()}"
    command = ["build", "--file", str(DOCKERFILE), "--ignorefile", f"{DOCKERFILE}.dockerignore", "--target", "cpu"]
    built = _buildah(
        *command, "--build-arg", f"PYTHON_IMAGE={base}", "--tag", image, str(chart.ROOT), within_s=_BUILD_S
    )
    assert built.returncode == 0, (built.stdout + built.stderr)[-5000:]
    try:
        made = _buildah("from", image, within_s=_RUN_S)
        assert made.returncode == 0, made.stderr
        try:
            yield made.stdout.strip()
        finally:
            _buildah("rm", made.stdout.strip(), within_s=_RUN_S)
    finally:
        _buildah("rmi", image, within_s=_RUN_S)


def _run(container: str, *command: str) -> str:
    ran = _buildah("run", container, "--", *command, within_s=_RUN_S)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def test_the_image_answers_as_its_user(container: str) -> None:
    assert _run(container, "id", "-u").strip() == "1000"
    assert _run(container, *_ASK) == "two thousand and nine\n"


def test_the_service_is_in_it(container: str) -> None:
    assert "usage: python -m cluster up" in _run(container, "python", "-m", "cluster", "up", "--help")


def test_only_what_is_let_in_is_copied(container: str) -> None:
    there = set(_run(container, "ls", "-A", "/app").split())
    assert there == {
        "actors",
        "cluster",
        "deploy",
        "protos",
        "twotower",
        "twotower_client",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
    }
    assert set(_run(container, "ls", "/app/deploy").split()) == {"locks", "prove_cpu.py", "serve"}
