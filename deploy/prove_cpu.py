"""Fails where anything of CUDA is installed, or a torch not built for CPUs: run while the CPU image is built."""

import re
import sys
from importlib.metadata import distributions, version

OF_CUDA = re.compile(r"(nvidia|cuda)[-_].+|triton")


def main() -> None:
    found = [f"{package.name} {package.version}" for package in distributions() if OF_CUDA.fullmatch(package.name)]
    if not (torch := version("torch")).endswith("+cpu"):
        found.append(f"torch {torch}")
    if found:
        sys.exit(f"got {', '.join(sorted(found))} in the image for CPUs, wanted torch's CPU build and nothing of CUDA")


if __name__ == "__main__":
    main()
