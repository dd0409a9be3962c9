"""What all tests share: one Ray cluster for all of a worker's, started when the first test asks for it."""

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from cluster.ops.local_ray import prepare_environment

# Before torch is imported anywhere, here and in child processes. The models of the tests are so small that a second
# thread costs more than it brings. Not by way of torch, which the process that only hands out tests can do without.
os.environ["OMP_NUM_THREADS"] = "1"
# Before Ray is imported anywhere: it must contact nothing beyond loopback.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_REPORT_URL"] = "http://127.0.0.1:9/"
# Ray's workers would yield to every other process: they start with niceness 15, and the other half of the tests has 0.
os.environ.update(RAY_worker_niceness="0")
prepare_environment()

FAKE_GPUS = 8
TESTS = Path(__file__).parent
# Files whose tests take minutes, the longest first.
LONG = (
    "pods/test_rayservice.py",
    "benchmarks/test_chaos.py",
    "cluster/test_metrics.py",
    "actors/test_cell.py",
    "cluster/test_killed_up.py",
    "cluster/test_stopping.py",
    "cluster/test_replacing.py",
    "cluster/test_changes.py",
    "cluster/test_survival.py",
    "cluster/test_mending.py",
    "clients/test_clients.py",
    "commands/test_readme.py",
    "cluster/test_autoscaling.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported here stays to the end; a collection of garbage that looked through it took 0.2 s each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For workers, which take files in this order: no long one is the last, beside idle cores. The longest comes first,
    and what needs no Ray after it: beside its hosts it gets the time that they leave."""
    if not hasattr(config, "workerinput"):
        return
    with_ray = {item.path for item in items if item.get_closest_marker("ray")}
    places = {TESTS / name: place for place, name in enumerate(LONG)}

    def place(item: pytest.Item) -> tuple[int, int]:
        known = places.get(item.path, len(LONG))
        return 0 if known == 0 else 2 if item.path in with_ray else 1, known

    items.sort(key=place)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with made-up GPUs: nothing computes on them, but placement and pinning are real."""
    import ray

    ray.init(
        address="local",  # not one that happens to run here
        num_cpus=2,
        num_gpus=FAKE_GPUS,
        object_store_memory=2**27,  # as of `up`: a third of the memory each would be too much for all workers' together
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.2",
    )
    yield
    ray.shutdown()
