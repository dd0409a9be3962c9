"""Our RayService on two hosts under load: what Kubernetes and KubeRay do to it, and what its clients notice."""

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.pods_parts.load import QUESTIONS
from benchmarks.pods_parts.rayservice import WORKERS, RayService, running_rayservice
from benchmarks.pods_parts.strangers import WANTED, told
from tests.pods.namespaces import require_namespaces

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

A, B = WORKERS
PATIENCE_S = 180.0
SOME = 12  # requests that end
SLOTS = 3  # of a cell, from the change of configuration on: fewer than there are clients


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayService]:
    require_namespaces()
    with running_rayservice(tmp_path_factory.mktemp("pods")) as service:
        yield service


@pytest.fixture(autouse=True)
def all_is_well(service: RayService) -> Iterator[None]:
    """Whatever a test did: every request that it saw has ended, right."""
    before = len(service.load.requests())
    yield
    service.load.ask()
    service.load.wait_until_idle(PATIENCE_S)
    print(f"{service.load.summary()}; {service.resumed()} resumed, {service.handed_over()} handed over")
    asked = service.load.requests()[before:]
    bad = [request for request in asked if not request.is_good]
    assert asked and not bad, f"{len(bad)} of {len(asked)}: {bad[:5]}\n{service.said()}"


def test_each_host_holds_a_cell_and_a_router_and_answers(service: RayService) -> None:
    service.until(service.is_whole, "a cell and a router on each host")
    for host in service.hosts.values():
        service.load.ask(host)
        service.load.wait_for_more(QUESTIONS, PATIENCE_S, [host])
        assert {request.what.split()[0] for request in service.load.requests(host)} == {"grpc", "http"}


def test_strangers_get_nothing_and_renewed_certificates_cost_nothing(service: RayService) -> None:
    """No key, no certificate, no TLS. Then the service's Secret changes under load, and clients connect anew."""
    assert told(service.where, service.hosts[A]) == WANTED
    secrets, hosts = service.where.secrets, list(service.hosts.values())
    service.load.ask(*hosts, long=True)
    service.load.wait_for_long_streams(2, PATIENCE_S)
    secrets.renew()
    service.until(lambda: service.shows(secrets.shown), "new connections see the new certificate")
    service.load.ask(*hosts, anew=True)
    service.load.wait_for_more(SOME, PATIENCE_S)


def test_the_drain_of_a_node(service: RayService) -> None:
    """Kubernetes sends SIGTERM, and a little later nobody sends the pod new requests. Another pod starts meanwhile."""
    service.load.ask(*service.hosts.values())
    service.load.wait_for_more(SOME, PATIENCE_S)
    old = service.pods[A]
    old.terminate()
    service.load.wait_for_more(2, PATIENCE_S)
    service.load.ask(service.hosts[B])
    service.start_worker(A)
    service.until(lambda: not _on(old.address, service), "its cell and its router are gone")
    service.load.ask(service.hosts[B], easy=True)
    service.until(lambda: old.has_ended, "the pod has ended by itself", service.manifest.worker.grace_s)
    service.until(lambda: service.running("Cell") == sorted(service.hosts.values()), "a cell on the new pod")
    service.load.wait_for_more(SOME, PATIENCE_S)


@pytest.mark.long  # tests/cluster/test_changes.py has one on a single host
def test_a_change_of_configuration(service: RayService) -> None:
    """All cells and routers are replaced. Hosts get requests where they are ready."""
    ready = [service.hosts[name] for name in WORKERS if service.is_ready(name)]
    print(f"ready: {len(ready)} of {len(WORKERS)}")
    service.load.ask(*ready)
    service.load.wait_for_more(SOME, PATIENCE_S)
    before = _now(service)
    assert len(before) == 4
    service.put({"cell": {"max_sequences": SLOTS}, "decode": {"max_new_tokens": 96}})
    service.until(lambda: bool(before - _now(service)), "one is gone")
    service.load.ask(*ready, easy=True)
    service.until(lambda: not before & _now(service) and service.is_whole(), "all are replaced")
    service.until(lambda: all(map(service.is_ready, WORKERS)), "each host is ready")
    service.load.ask(*service.hosts.values())
    service.load.wait_for_more(SOME, PATIENCE_S, list(service.hosts.values()))


def test_a_partition_and_its_healing(service: RayService) -> None:
    """One host is cut off from all others until Ray has given it up. Clients of the other host notice nothing.

    At the cut they have more streams than that host's cell has slots, so that some are on the cell that is cut off.
    """
    service.spread({"cell": {"max_sequences": SLOTS}, "decode": {"max_new_tokens": 80}})
    service.load.ask(service.hosts[B])
    service.load.wait_until_idle(PATIENCE_S, service.hosts[A])
    service.load.wait_for_more(SOME, PATIENCE_S)
    resumed = service.resumed()
    service.load.ask(service.hosts[B], long=True)
    service.load.wait_for_long_streams(SLOTS + 1, PATIENCE_S)
    service.cut(A)
    service.load.ask(service.hosts[B])
    service.until(lambda: service.resumed() > resumed, "what ran there goes on elsewhere")
    service.until(lambda: A not in service.living(), "Ray has given the host up")
    service.load.wait_for_more(SOME, PATIENCE_S)
    service.load.ask(service.hosts[B], easy=True)
    old = service.pods[A]
    service.heal(A)
    service.until(lambda: old.has_ended, "a node that was given up ends by itself")
    service.start_worker(A)
    service.until(lambda: service.running("Cell") == sorted(service.hosts.values()), "a cell on the new pod")
    service.until(lambda: len(service.running("Router")) == len(WORKERS), "two routers")
    service.load.wait_for_more(SOME, PATIENCE_S)


def _now(service: RayService) -> set[str]:
    return {replica["replica_id"] for replica in _all(service)}


def _on(host: str, service: RayService) -> set[str]:
    return {replica["replica_id"] for replica in _all(service) if replica.get("node_ip") == host}


def _all(service: RayService) -> list[dict[str, Any]]:
    return service.replicas("Cell") + service.replicas("Router")
