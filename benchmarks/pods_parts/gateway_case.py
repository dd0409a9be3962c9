"""All requests go through an Envoy: a router dies, then its pod is drained."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.pods_parts.clients import Clients
from benchmarks.pods_parts.gateway import Gateway
from benchmarks.pods_parts.rayservice import WORKERS, RayService, running
from benchmarks.pods_parts.report import Result
from benchmarks.pods_parts.secrets import GATEWAY
from benchmarks.pods_parts.site import site
from benchmarks.pods_parts.under_watch import (
    PATIENCE_S,
    ROUTER,
    SOME,
    STREAMS,
    is_mended,
    refuse_strangers,
    replicas,
    settle,
    watched,
    with_one_router_a_host,
)

A, B = WORKERS
_BEGUN, _SILENT = 2, 2  # streams that have begun, and requests that have not


def behind_a_gateway(directory: Path, result: Result) -> None:
    """A router is killed, then its node is drained."""
    with (
        site(directory) as where,
        running(with_one_router_a_host(where), where) as service,
        watched(result, where.load, service),
    ):
        gateway = Gateway(where, list(service.hosts.values()))
        service.until(lambda: gateway.is_ready(*service.hosts.values()), "the gateway takes both hosts for healthy")
        refuse_strangers(result, where, gateway.address, GATEWAY)
        service.load.ask(gateway.address)
        service.load.wait_for_more(SOME, PATIENCE_S)
        with _sent_again(result, gateway, "while a router was gone"):
            _lose_a_router(service, gateway, result)
        with _sent_again(result, gateway, "during the drain"):
            _drain(service, gateway)
        for face, requests in gateway.requests().items():
            if not all(requests.get(host) for host in service.hosts.values()):
                result.wrong.append(f"{face}: got {requests} requests on the hosts, wanted some on each")
        settle(service.load)
        _check_cut(result, service.load)


@contextmanager
def _sent_again(result: Result, gateway: Gateway, when: str) -> Iterator[None]:
    before = gateway.sent_again()
    yield
    numbers = " and ".join(f"{now - before[face]} {face}" for face, now in gateway.sent_again().items())
    result.notes.append(f"the gateway sent {numbers} requests to another host {when}")


def _lose_a_router(service: RayService, gateway: Gateway, result: Result) -> None:
    """What the gateway cannot save is asked again."""
    load, hosts, old = service.load, list(service.hosts.values()), replicas(service)
    load.ask(gateway.address, long=True, again=True)
    load.wait_for_long_streams(STREAMS, PATIENCE_S)
    load.ask(gateway.address, again=True)
    load.wait_for_a_mixture(_BEGUN, _SILENT, PATIENCE_S)
    begun = [request.streams for request in load.requests() if not request.outcome]
    result.notes.append(
        f"{begun.count(True)} streams that had begun and {begun.count(False)} requests that had no answer yet were "
        "under way when a router was killed"
    )
    result.struck = time.monotonic()
    service.kill(A, ROUTER)
    service.until(lambda: is_mended(service, old), "another router is there")
    service.until(lambda: gateway.is_ready(*hosts), "the gateway takes both hosts for healthy again")
    load.wait_for_more(SOME, PATIENCE_S)


def _check_cut(result: Result, load: Clients) -> None:
    """Only a stream that had begun may have an error: of nothing else has a client heard anything."""
    cut = [request for request in load.requests() if request.errors]
    result.notes.append(f"{len(cut)} requests were cut, and asked again by their clients")
    result.notes += [f"told: {text}" for text in sorted({error[:120] for r in cut for _, _, error in r.errors})]
    if silent := [request for request in cut if not request.events or request.events[0] > request.errors[0][0]]:
        result.wrong.append(f"{len(silent)} requests that had no answer yet had an error: {silent[0].errors[0][2]}")


def _drain(service: RayService, gateway: Gateway) -> None:
    """As by `kubectl drain`: SIGTERM, a little later the endpoint is gone, and another pod comes up meanwhile."""
    load, old = service.load, service.pods[A]
    load.ask(gateway.address, long=True)
    load.wait_for_long_streams(STREAMS, PATIENCE_S)
    load.ask(gateway.address)
    old.terminate()
    load.wait_for_more(2, PATIENCE_S)
    gateway.route(service.hosts[B])
    load.ask(gateway.address, easy=True)
    service.start_worker(A)
    service.until(lambda: old.has_ended, "the drained pod has ended by itself", service.manifest.worker.grace_s)
    service.until(lambda: service.is_whole() and service.is_ready(A), "a cell and a router on the pod in its place")
    gateway.route(*service.hosts.values())
    service.until(lambda: gateway.is_ready(*service.hosts.values()), "the gateway takes the new pod for healthy")
    load.ask(gateway.address)
    load.wait_for_more(2 * SOME, PATIENCE_S)
