"""What all tests share: one Ray cluster for the whole run, started when the first test asks for it."""

import os
from collections.abc import Iterator

import pytest
import torch

from cluster.local_ray import prepare_environment

# The models of the tests are so small that a second thread costs more than it brings, here and in child processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Ray is imported anywhere: it must contact nothing beyond loopback.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_REPORT_URL"] = "http://127.0.0.1:9/"
prepare_environment()

FAKE_GPUS = 8

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with made-up GPUs: nothing computes on them, but placement and pinning are real."""
    import ray

    ray.init(
        num_cpus=2,
        num_gpus=FAKE_GPUS,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.2",
    )
    yield
    ray.shutdown()
