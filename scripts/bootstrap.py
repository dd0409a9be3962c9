"""Makes .venv for this checkout: torch for this machine, then the project, editable, with its serve and dev extras."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from environment import ROOT, TORCH, TORCH_CPU_INDEX, TORCH_VERSION, Environment, EnvironmentFailed, has_gpu

HERE = Path(__file__).resolve()
PROJECT = Environment(
    ROOT / ".venv",
    (HERE, HERE.with_name("environment.py"), HERE.with_suffix(".sh"), ROOT / "pyproject.toml"),
    for_gpus=True,
)

# Half of the installed files, and none that a tower, a router or a test imports.
SELDOM_USED = r"/transformers/models/(?!auto/|nemotron_h/|__init__)|/tests/|/torch/testing/|/torch/_inductor/|/sympy/"


def install_torch(env: Environment, has_gpu: bool) -> None:
    index = os.environ.get("TORCH_INDEX_URL")
    if not has_gpu:
        env.install_cpu_torch(index or TORCH_CPU_INDEX)
        return
    if (build := env.torch_build()) and build[1]:
        return  # the owner's own choice of CUDA build
    # A CPU wheel in pip's configured links would win over the index's build, because "+cpu" sorts above it.
    source = ("--index-url", index) if index else ()
    env.pip(*source, f"{TORCH},!={TORCH_VERSION}+cpu", wanted=f"{TORCH} with CUDA")


def check_torch(env: Environment, has_gpu: bool) -> None:
    """The wrong torch would cost gigabytes, or run the towers on the CPU of a GPU machine without a word."""
    build = env.torch_build()
    if build is None:
        raise EnvironmentFailed(f"torch is installed but does not import; see {env.python} -c 'import torch'")
    version, cuda = build
    if (cuda is not None) != has_gpu:
        machine = "an NVIDIA GPU" if has_gpu else "no NVIDIA GPU"
        kind = f"built for CUDA {cuda}" if cuda else "a CPU build"
        raise EnvironmentFailed(
            f"this machine has {machine}, but torch {version} is {kind}. Delete .venv and run again; "
            "if it comes back, set TORCH_INDEX_URL to PyTorch's wheel index for this machine"
        )


def compile_what_is_used(env: Environment) -> None:
    """Bytecode, on all cores, of what our processes import: pip would compile everything, one file after the other.

    The rest is compiled when it is imported, as Python does.
    """
    packages = next((env.venv / "lib").glob("python3.*/site-packages"))
    subprocess.run([env.python, "-m", "compileall", "-q", "-j", "0", "-x", SELDOM_USED, packages], capture_output=True)


def build(env: Environment) -> None:
    gpu = has_gpu()
    print(f"[1/3] Python {sys.version.split()[0]} ({sys.executable}) in {env.venv.name}", flush=True)
    env.make()
    kind = "with CUDA: nvidia-smi sees a GPU" if gpu else "CPU build: no NVIDIA GPU here"
    print(f"[2/3] {TORCH}, {kind}", flush=True)
    install_torch(env, gpu)
    print("[3/3] The project and what it needs (a minute or two the first time)", flush=True)
    env.pip("--editable", f"{ROOT}[serve,dev]", wanted="the project's dependencies")
    compile_what_is_used(env)
    check_torch(env, gpu)


if __name__ == "__main__":
    sys.exit(PROJECT.bring_up(build))
