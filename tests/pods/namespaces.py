"""Where network namespaces can be made."""

import os

import pytest

from benchmarks.pods_parts.network import PROGRAMS, why_not


def require_namespaces() -> None:
    """Skips where no network namespace can be made; fails there when REQUIRE_ALL=1."""
    problem = why_not()
    if problem is None:
        return
    message = f"pods are network namespaces, which want Linux, root and {', '.join(PROGRAMS)}: {problem}"
    if os.environ.get("REQUIRE_ALL") == "1":
        pytest.fail(message)
    pytest.skip(message)
