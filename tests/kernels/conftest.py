"""These tests run in an environment of their own, .venv-kernels: `make test-kernels`. Elsewhere they are not there.

Triton's interpreter is chosen for a whole process, so where torch has CUDA they stay out: `gpu` tests have the device.
"""

import importlib.util

import torch

if importlib.util.find_spec("mamba_ssm") is None or torch.version.cuda:
    collect_ignore_glob = ["test_*.py"]
