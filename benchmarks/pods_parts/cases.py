"""The cases: what Kubernetes, KubeRay or an accident does to our RayService under load, one service for each."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pods_parts.clients import Clients, Request
from benchmarks.pods_parts.gateway_case import behind_a_gateway
from benchmarks.pods_parts.manifest import Manifest
from benchmarks.pods_parts.rayservice import WORKERS, RayService, running
from benchmarks.pods_parts.report import Result
from benchmarks.pods_parts.site import site
from benchmarks.pods_parts.under_watch import (
    PATIENCE_S,
    ROUTER,
    SOME,
    counted,
    is_mended,
    replicas,
    settle,
    warm,
    watched,
    with_one_router_a_host,
)
from benchmarks.pods_parts.weights import write_other_weights

A, B = WORKERS
_AWAY_S = 5.0  # between the end of the head and its next start
_UPGRADE_DRAIN_S = 30  # of a cell, in the upgrade: the head takes as long and 15 s more, whatever runs
_TOLD_S = 1.0
_RENEWALS = 2
_CELL = "ray::ServeReplica:twotower:Cell"


@dataclass(frozen=True)
class Case:
    """`run` fills the result, and raises where something does not come about. `needs`: programs."""

    name: str
    what: str
    run: Callable[[Path, Result], None]
    needs: tuple[str, ...] = ()


def lost_head(directory: Path, result: Result) -> None:
    with site(directory) as where:
        manifest = Manifest.for_two_small_hosts(where.secrets.directory, redis=where.start_redis())
        with running(manifest, where) as service, watched(result, where.load, service):
            warm(service, result)
            before, head = replicas(service), service.pods["head"]
            result.struck = time.monotonic()
            head.kill()
            service.load.ask(*service.hosts.values())
            answered = service.load.answered()
            service.load.wait_for_more(SOME, PATIENCE_S)
            time.sleep(max(0.0, result.struck + _AWAY_S - time.monotonic()))
            result.notes.append(f"{service.load.answered() - answered} requests ended while there was no head")
            head.start_again()
            service.load.ask(*service.hosts.values(), easy=True)
            service.until(lambda: service.living() == {"head", *WORKERS}, "the head is back, and has all nodes")
            service.until(service.is_whole, "Serve says that all runs")
            if replicas(service) != before:
                result.wrong.append(f"got cells and routers {replicas(service)}, wanted those of before: {before}")
            _lose_a_cell(service, result)
            service.load.ask(*service.hosts.values())
            service.load.wait_for_more(SOME, PATIENCE_S, list(service.hosts.values()))


def _lose_a_cell(service: RayService, result: Result) -> None:
    """What is lost after it is replaced as ever."""
    old = {replica["replica_id"] for replica in service.replicas("Cell")}
    service.kill(B, _CELL)

    def replaced() -> bool:
        new = {replica["replica_id"] for replica in service.replicas("Cell")}
        return new != old and service.is_whole()

    service.until(replaced, "a cell that was killed then is replaced")


def changed_weights(directory: Path, result: Result) -> None:
    other = write_other_weights(directory / "weights")
    with site(directory, other) as where:
        manifest = Manifest.for_two_small_hosts(where.secrets.directory, spare=True)
        with running(manifest, where) as service, watched(result, where.load, service):
            warm(service, result)
            before = replicas(service)
            result.struck = time.monotonic()
            service.put({"model": {"checkpoint": str(other)}})
            service.load.ask(*service.hosts.values())
            service.until(lambda: bool(replicas(service) - before), "the first new one starts")
            service.load.ask(*service.hosts.values(), easy=True)
            service.until(lambda: not before & replicas(service) and service.is_whole(), "all are replaced")
            since = time.monotonic()
            service.load.ask(*service.hosts.values())
            service.load.wait_for_more(2 * SOME, PATIENCE_S, list(service.hosts.values()))
        result.notes.append(
            f"the other weights answer {where.load.differ} of {where.load.questions} questions otherwise"
        )
        _check_weights(result, since)


def _check_weights(result: Result, since: float) -> None:
    """Since then the other weights alone have answered."""
    late = [request for request in result.requests if request.sent > since and request.differs]
    old = [request for request in late if request.outcome == "right"]
    if old or not late:
        result.wrong.append(f"got {len(old)} of {len(late)} answers of the old weights after the change, wanted none")


def ended_cluster(directory: Path, result: Result) -> None:
    with ExitStack() as stack:
        where = stack.enter_context(site(directory))
        manifest = Manifest.for_two_small_hosts(where.secrets.directory, cell_drain_s=_UPGRADE_DRAIN_S)
        old = stack.enter_context(running(manifest, where))
        stack.enter_context(watched(result, where.load, old))
        old.load.ask(*old.hosts.values(), easy=True)
        with running(manifest, where, "new") as new, counted(result, new):
            warm(old, result)
            old_hosts = list(old.hosts.values())
            new.load.ask(*new.hosts.values())
            result.struck = time.monotonic()
            under_way = sum(new.load.under_way(host) for host in old_hosts)
            result.notes.append(f"{under_way} requests were under way in the old cluster when all its pods got SIGTERM")
            ending = old.terminate()
            new.load.wait_for_more(SOME, PATIENCE_S, list(new.hosts.values()))
            new.load.ask(*new.hosts.values(), easy=True)
            new.until(
                lambda: all(pod.has_ended for pod in ending[1:]), "the old workers have ended by themselves",
                manifest.worker.grace_s,
            )  # fmt: skip
            new.until(lambda: ending[0].has_ended, "the old head has, too", manifest.head.grace_s)
            new.load.ask(*new.hosts.values())
            new.load.wait_for_more(SOME, PATIENCE_S, list(new.hosts.values()))
            settle(new.load)  # before it ends


def lost_router(directory: Path, result: Result) -> None:
    with (
        site(directory) as where,
        running(with_one_router_a_host(where), where) as service,
        watched(result, where.load, service),
    ):
        warm(service, result, again=True)
        hosts, old = service.hosts, replicas(service)
        under_way = [request for request in service.load.requests(hosts[A]) if not request.outcome]
        result.struck = time.monotonic()
        service.kill(A, ROUTER)
        asked: list[list[str]] = []

        def is_back() -> bool:
            """Meanwhile requests go to those that are ready, as by a Service."""
            ready = [hosts[name] for name in WORKERS if service.is_ready(name)]
            if ready and [ready] != asked[-1:]:
                asked.append(ready)
                service.load.ask(*ready, again=True)
            return len(ready) == len(WORKERS) and is_mended(service, old)

        service.until(is_back, "another router is there")
        service.load.wait_for_more(SOME, PATIENCE_S, list(hosts.values()))
        settle(service.load)
        _check_told(result, service.load, under_way, hosts)


def _check_told(result: Result, load: Clients, under_way: list[Request], hosts: dict[str, str]) -> None:
    """Who was told, how soon, and that nobody else was."""
    told = [request for request in under_way if request.errors]
    late = [request.errors[0][0] - result.struck for request in told]
    result.notes.append(
        f"{len(under_way)} requests were with the router that was killed: {len(told)} were told so, the last after "
        f"{max(late, default=0.0):.2f} s; the others had been answered"
    )
    later = [r for r in load.requests() if r.errors and r not in under_way and r.errors[0][1] == hosts[A]]
    result.notes.append(f"{len(later)} requests that came to its host before another was there were told so")
    words = sorted({error[:100] for request in load.requests() for _, _, error in request.errors})
    result.notes += [f"told: {text}" for text in words]
    if not told:
        result.wrong.append("nobody was told: no request was with the router")
    if late and max(late) > _TOLD_S:
        result.wrong.append(f"a client was told after {max(late):.2f} s, wanted {_TOLD_S:g} s at most")
    others = [r for r in load.requests() if any(host != hosts[A] for _, host, _ in r.errors)]
    if others:
        result.wrong.append(f"{len(others)} requests of the other router had an error: {others[0].errors[0][2]}")


def renewed_certificates(directory: Path, result: Result) -> None:
    with (
        site(directory) as where,
        running(Manifest.for_two_small_hosts(where.secrets.directory), where) as service,
        watched(result, where.load, service),
    ):
        secrets, hosts = where.secrets, list(service.hosts.values())
        for number in range(1, _RENEWALS + 1):
            warm(service, result)
            result.struck = result.struck or time.monotonic()
            secrets.renew()
            service.until(lambda: service.shows(secrets.shown), f"new connections see certificate {number + 1}")
            service.load.ask(*hosts, anew=True)
            service.load.wait_for_more(SOME, PATIENCE_S, hosts)


CASES = (
    Case(
        "renewal",
        "The Secret of the service gets another certificate, twice, under load: the kubelet exchanges the files. Then "
        "clients connect anew. What runs goes on over connections that stood.",
        renewed_certificates,
    ),
    Case(
        "head",
        "All processes of the head are killed; with GCS fault tolerance on a Redis. It comes back after some seconds.",
        lost_head,
        ("redis-server",),
    ),
    Case("weights", "`model.checkpoint` names other weights; there is room for new cells.", changed_weights),
    Case(
        "upgrade",
        "A second Ray cluster has come up and gets all new requests. At once SIGTERM ends all pods of the first, with "
        "its requests under way. KubeRay waits longer.",
        ended_cluster,
    ),
    Case(
        "router",
        "A router is killed. What fails is asked again under its request id, of the hosts that are ready.",
        lost_router,
    ),
    Case(
        "gateway",
        "All requests go through an Envoy, which sends again what a router has not begun to answer. A router dies, "
        "and its streams are asked again. Then its pod is drained, and nothing is asked again.",
        behind_a_gateway,
        ("envoy",),
    ),
)
