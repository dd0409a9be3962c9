"""`import twotower` works where only torch is installed: it never pulls in what serves it."""

import pkgutil
import subprocess
import sys

import pytest

import twotower

SERVING = {"ray", "grpc", "pydantic", "fastapi", "starlette", "actors", "cluster"}
# Loaded on CUDA alone, through `importlib`.
WITH_TRITON = {"twotower.decoding.fused_guesses", "twotower.model.kernels.quantised_product"}
# twotower.pb holds the gRPC stubs; importing __main__ would run it.
MODULES = [
    module.name
    for module in pkgutil.walk_packages(twotower.__path__, "twotower.")
    if not module.name.startswith("twotower.pb")
    and not module.name.endswith("__main__")
    and module.name not in WITH_TRITON
]


@pytest.mark.slow
def test_the_whole_library_pulls_in_nothing_of_serving() -> None:
    report = f"import sys, {', '.join(MODULES)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & SERVING
