"""What every case does: load that is under way, and requests that are counted, whatever happens."""

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.pods_parts.clients import Clients
from benchmarks.pods_parts.manifest import Manifest
from benchmarks.pods_parts.rayservice import WORKERS, RayService
from benchmarks.pods_parts.report import Result
from benchmarks.pods_parts.secrets import SERVICE
from benchmarks.pods_parts.site import Site
from benchmarks.pods_parts.strangers import WANTED, told

PATIENCE_S = 180.0
SOME, STREAMS = 12, 4  # requests that end; streams that are under way when the fault comes
ROUTER = "ray::ServeReplica:twotower:Router"


def with_one_router_a_host(where: Site) -> Manifest:
    return Manifest.for_two_small_hosts(where.secrets.directory, routers_on_a_host=1)


def warm(service: RayService, result: Result, again: bool = False) -> None:
    """Load over both faces, then streams to be met by the fault."""
    hosts = list(service.hosts.values())
    service.load.ask(*hosts)
    service.load.wait_for_more(SOME, PATIENCE_S, hosts)
    service.load.ask(*hosts, long=True, again=again)
    service.load.wait_for_long_streams(STREAMS, PATIENCE_S)


@contextmanager
def watched(result: Result, load: Clients, service: RayService) -> Iterator[None]:
    """Whatever happens, the result has all requests of the case. They end, or have failed. Before, strangers try."""
    refuse_strangers(result, service.where, service.hosts[WORKERS[0]])
    try:
        with counted(result, service):
            yield
            settle(load)
    finally:
        result.requests = load.requests()


def refuse_strangers(result: Result, where: Site, host: str, name: str = SERVICE) -> None:
    got = told(where, host, name)
    wrong = [f"{what}: got {got[what]}, wanted {wanted}" for what, wanted in WANTED.items() if got[what] != wanted]
    result.wrong += [f"{name} told a stranger: {text}" for text in wrong]
    if not wrong:
        result.notes.append(f"{name} told strangers what it should: " + "; ".join(map(": ".join, WANTED.items())))


@contextmanager
def counted(result: Result, service: RayService) -> Iterator[None]:
    begun = len(service.waited)
    try:
        yield
    finally:
        result.waited += service.waited[begun:]
        result.resumed += service.resumed()
        result.handed_over += service.handed_over()


def settle(load: Clients) -> None:
    load.ask()
    load.wait_until_idle(PATIENCE_S)


def is_mended(service: RayService, old: set[str]) -> bool:
    """In this order: Serve takes a dead one for running for a while."""
    return replicas(service) != old and service.is_whole()


def replicas(service: RayService) -> set[str]:
    return {replica["replica_id"] for name in ("Cell", "Router") for replica in service.replicas(name)}
