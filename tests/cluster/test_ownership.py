"""A Ray that serves already: its application stays whose it is."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import client, deployment, ownership
from cluster.config import ServiceConfig, load_config
from cluster.deployment import Progress
from cluster.up import Up
from tests.cluster.service import Service, free_port, running_service
from tests.goldens import VENDORED
from twotower.errors import Unavailable

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def service(ray_cluster: None) -> Iterator[Service]:
    """Deployed without a mark, as an operator or `serve deploy` would."""
    with running_service(cell={"placement": "colocated"}) as running:
        yield running
    ownership.give_up()


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_up_does_not_take_over(service: Service) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    _, _, port = service.http.rpartition(":")
    command = [sys.executable, "-m", "cluster", "up", "--address", address]
    command += ["--set", f"ingress.http_port={port}", "--set", f"ingress.grpc_port={free_port()}"]
    ended = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stderr
    words = f"error: --address: the Ray at {address} serves an application 'twotower' already (RUNNING)"
    assert words in ended.stderr and "--replace" in ended.stderr
    assert client.is_ready(service.http)


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_each_up_knows_what_became_of_its_application(service: Service) -> None:
    """Last: ends the service."""
    checkpoint = str((VENDORED / "tt_moe").resolve())
    ports = {"http_port": int(service.http.rpartition(":")[2]), "grpc_port": free_port()}
    config = deployment.choice(
        ServiceConfig.parse({"model": {"checkpoint": checkpoint}, "cell": {"device": "cpu"}, "ingress": ports})
    ).config
    with pytest.raises(Unavailable, match="serves an application 'twotower' already"):
        ownership.take("there", replace=False)
    first = ownership.take("there", replace=True)
    assert deployment.progress(first).lost == "somebody has deleted it"
    deployment.deploy(config)
    second = ownership.take("there", replace=True)
    assert not client.is_ready(service.http), "what is replaced must not pass for what replaces it"
    deployment.deploy(config)
    assert "another `up`" in str(deployment.progress(first).lost) and deployment.progress(second).lost is None
    deployment.delete(first)
    assert deployment.progress(second).lost is None, "what was replaced must not end what has replaced it"
    deployment.delete(second)
    assert "deleted" in str(deployment.progress(second).lost)
    third = ownership.take("there", replace=False)
    with pytest.raises(Unavailable, match="another `up` that starts here, or died here"):
        ownership.take("there", replace=False)
    assert ownership.holder() == third


def test_an_up_whose_application_is_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.up._WATCH_S", 0.0)
    monkeypatch.setattr("cluster.deployment.progress", lambda mark: Progress(0, 0, lost="somebody has deleted it"))
    up = Up(load_config(None), "auto", verbose=False)
    for waits in (up._watch, up._wait_until_ready):
        with pytest.raises(Unavailable, match="not this service's any more: somebody has deleted it"):
            waits()
