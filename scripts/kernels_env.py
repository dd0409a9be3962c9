"""Makes .venv-kernels for this checkout: the packages for tests of the real kernels, without a GPU and without CUDA.

With them mamba-ssm's Triton kernels run on a CPU, under Triton's interpreter. The packages causal-conv1d and flash-attn
come without their compiled parts: enough to run their Python over stand-ins.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

from environment import ROOT, TORCH, TORCH_CPU_INDEX, Environment, EnvironmentFailed, has_gpu

HERE = Path(__file__).resolve()
KERNELS = Environment(
    ROOT / ".venv-kernels",
    (HERE, HERE.with_name("environment.py"), HERE.with_name("bootstrap.sh"), ROOT / "pyproject.toml"),
)

SOURCES = ("mamba-ssm==2.3.2.post1", "causal-conv1d==1.7.0", "flash-attn==2.8.3.post2")
# The first makes their builds go on where no CUDA compiler is, the second keeps them from asking for a ready wheel.
WITHOUT_CUDA = {
    f"{package}_{setting}": "TRUE"
    for package in ("MAMBA", "CAUSAL_CONV1D", "FLASH_ATTENTION")
    for setting in ("SKIP_CUDA_BUILD", "FORCE_BUILD")
}
BUILT_WITH = ("setuptools>=77", "wheel", "packaging")
RUN_WITH = ("triton==3.9.0", "einops==0.8.2")


def project_packages() -> list[str]:
    """What the library imports in these tests, and pytest with the plugins that its settings name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    library = [package for package in project["dependencies"] if not package.startswith("transformers")]
    return library + [package for package in project["optional-dependencies"]["dev"] if package.startswith("pytest")]


def build(env: Environment) -> None:
    print(f"[1/4] Python {sys.version.split()[0]} ({sys.executable}) in {env.venv.name}", flush=True)
    env.make()
    print(f"[2/4] {TORCH}, CPU build", flush=True)
    # On a machine with a GPU the variable names the index of a CUDA build, for .venv.
    index = None if has_gpu() else os.environ.get("TORCH_INDEX_URL")
    env.install_cpu_torch(index or TORCH_CPU_INDEX)
    print(f"[3/4] {RUN_WITH[0]} and what the tests need", flush=True)
    env.pip(TORCH, *BUILT_WITH, *RUN_WITH, *project_packages(), wanted="what the tests of the kernels need")
    print(f"[4/4] {', '.join(SOURCES)}, from source, without CUDA", flush=True)
    # Not from pip's cache and not into it: a machine with a GPU must never meet these wheels.
    options = ("--no-deps", "--no-build-isolation", "--no-cache-dir")
    env.pip(*options, *SOURCES, wanted="the kernels' packages", settings=WITHOUT_CUDA)
    check_torch(env)


def check_torch(env: Environment) -> None:
    """With CUDA's torch there would be no test to run."""
    build = env.torch_build()
    if build is None or build[1] is not None:
        found = f"torch {build[0]}, built for CUDA {build[1]}" if build else "no torch that imports"
        raise EnvironmentFailed(
            f"got {found}, wanted a CPU build. Delete {env.venv.name} and run again; if it comes back, set "
            "TORCH_INDEX_URL to PyTorch's CPU wheel index, or unset it"
        )


if __name__ == "__main__":
    sys.exit(KERNELS.bring_up(build))
