"""Writes deploy/locks: every package of the images, with the digest of the one file that is installed.

For Python 3.12 on Linux, x86-64. Asks the package index, so it is run by hand. Tests compare its output with
pyproject.toml. The CPU build of torch is on a separate index: the CPU image pins it by its version alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from environment import ROOT, TORCH
from kernels_env import RUN_WITH, SOURCES, WITHOUT_CUDA

LOCKS = ROOT / "deploy" / "locks"
PYTHON, NEWEST_GLIBC = "3.12", 41
PLATFORMS = ("manylinux1", "manylinux2010", "manylinux2014", *(f"manylinux_2_{n}" for n in range(5, NEWEST_GLIBC + 1)))
# What CUDA's torch brings, and nothing else does.
OF_CUDA = re.compile(r"torch|triton|cuda-.+|nvidia-.+")
BUILT_WITH = ("ninja", "wheel")
HEAD = f"# Made by scripts/lock.py: Python {PYTHON}, Linux, x86-64.\n"

Locked = dict[str, tuple[str, str]]  # version and sha256 by normal name


def project() -> list[str]:
    """What the service needs, with its traces."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = told["optional-dependencies"]
    return [*told["dependencies"], *extras["serve"], *extras["otel"]]


def einops() -> str:
    """The kernels' own dependency that they import."""
    [found] = [package for package in RUN_WITH if package.startswith("einops")]
    return found


def pip(*arguments: str, **settings: str) -> None:
    """Without the machine's own links: a lock is the same wherever it is made."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_FIND_LINKS")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, **settings}
    if subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet"], env=environment).returncode:
        sys.exit("pip could not resolve or fetch: see above")


def resolved(requirements: Iterable[str]) -> Locked:
    platforms = [part for platform in PLATFORMS for part in ("--platform", f"{platform}_x86_64")]
    with TemporaryDirectory() as directory:
        report = Path(directory, "report.json")
        pip(
            *("install", "--dry-run", "--ignore-installed", "--only-binary", ":all:", "--python-version", PYTHON),
            *(*platforms, "--target", directory, "--report", str(report), *requirements),
        )
        return dict(map(_locked, json.loads(report.read_text(encoding="utf-8"))["install"]))


def _locked(item: dict[str, Any]) -> tuple[str, tuple[str, str]]:
    told = item["metadata"]
    return normal(told["name"]), (told["version"], item["download_info"]["archive_info"]["hashes"]["sha256"])


def sources() -> Locked:
    """The kernels' source archives."""
    with TemporaryDirectory() as directory:
        options = ("--no-deps", "--no-build-isolation", "--no-binary", ":all:")
        pip("download", *options, "--dest", directory, *SOURCES, **WITHOUT_CUDA)
        return dict(map(_digest, sorted(Path(directory).iterdir())))


def _digest(archive: Path) -> tuple[str, tuple[str, str]]:
    name, version = archive.name.removesuffix(".tar.gz").rsplit("-", 1)
    return normal(name), (version, hashlib.sha256(archive.read_bytes()).hexdigest())


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def text(locked: Locked) -> str:
    lines = [f"{name}=={version} --hash=sha256:{digest}\n" for name, (version, digest) in sorted(locked.items())]
    return HEAD + "".join(lines)


def main() -> None:
    gpu = resolved([TORCH, *project(), einops()])
    build = {name: found for name, found in resolved(BUILT_WITH).items() if name not in gpu}
    needless = normal(einops().partition("==")[0])
    cpu = {name: found for name, found in gpu.items() if not OF_CUDA.fullmatch(name) and name != needless}
    LOCKS.mkdir(exist_ok=True)
    for name, locked in {"cpu": cpu, "gpu": gpu, "build": build, "kernels": sources()}.items():
        (LOCKS / f"{name}.txt").write_text(text(locked), encoding="utf-8")


if __name__ == "__main__":
    main()
