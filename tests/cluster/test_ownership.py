"""A Ray that serves already: its application stays whose it is."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.reference.service import free_port
from cluster.cli import asking
from cluster.cli.up import Up
from cluster.config import ServiceConfig, load_config
from cluster.ops import deployment, ownership
from cluster.ops.deployment import Progress
from tests.cluster.service import Service, running_service
from tests.goldens import VENDORED
from twotower.errors import Unavailable

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def service(ray_cluster: None) -> Iterator[Service]:
    """Deployed without a mark, as an operator or `serve deploy` would."""
    with running_service(cell={"placement": "colocated"}) as running:
        yield running
    ownership.give_up(ownership.holder() or b"")


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
    assert asking.is_ready(service.http)


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_each_up_knows_what_became_of_its_application(service: Service) -> None:
    """Last: ends the service."""
    checkpoint = str((VENDORED / "tt_moe").resolve())
    ports = {"http_port": int(service.http.rpartition(":")[2]), "grpc_port": free_port()}
    config = deployment.choice(
        ServiceConfig.parse({"model": {"checkpoint": checkpoint}, "cell": {"device": "cpu"}, "ingress": ports})
    ).config
    first, second, third, fourth = (ownership.new_mark(own_ray=False) for _ in range(4))
    with pytest.raises(Unavailable, match="serves an application 'twotower' already"):
        ownership.take(first, "there", replace=False)
    _replaces(first)
    assert deployment.progress(first).lost == "somebody has deleted it"
    deployment.deploy(config)
    _replaces(second)
    assert not asking.is_ready(service.http), "what is replaced must not pass for what replaces it"
    deployment.deploy(config)
    assert "another `up`" in str(deployment.progress(first).lost) and deployment.progress(second).lost is None
    deployment.delete(first)
    assert deployment.progress(second).lost is None, "what was replaced must not end what has replaced it"
    deployment.delete(second)
    assert "deleted" in str(deployment.progress(second).lost)
    ownership.take(third, "there", replace=False)
    with pytest.raises(Unavailable, match="belongs to another `up`, which is starting or was killed"):
        ownership.take(fourth, "there", replace=False)
    assert ownership.holder() == third


def _replaces(mark: bytes) -> None:
    ownership.take(mark, "there", replace=True)
    deployment.clear_place(within_s=60)


class Store:
    """Ray's key-value store, for one key. `meanwhile` is what others do between our look and our put."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, value: bytes | None = None) -> None:
        self.value, self.meanwhile = value, list[bytes | None]()
        monkeypatch.setattr(ownership, "_internal_kv_get", lambda key, namespace: self.value)
        monkeypatch.setattr(ownership, "_internal_kv_put", self._put)
        monkeypatch.setattr(ownership, "_internal_kv_del", self._delete)
        nothing_runs = SimpleNamespace(applications={})
        monkeypatch.setattr(ownership.serve, "status", lambda: nothing_runs)

    def _put(self, key: bytes, mark: bytes, overwrite: bool, namespace: bytes) -> bool:
        there = self.value
        if self.meanwhile:  # there for as long as our put takes
            there = self.meanwhile.pop(0)
        if overwrite or there is None:
            self.value = mark
        return there is not None

    def _delete(self, key: bytes, namespace: bytes) -> None:
        self.value = None


def test_a_faster_one_that_has_left_again_leaves_the_place_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    store, mark = Store(monkeypatch), ownership.new_mark(own_ray=False)
    store.meanwhile = [b"faster", b"faster too"]
    ownership.take(mark, "there", replace=False)
    assert ownership.holder() == mark, "what was taken must be stored"


def test_a_mark_is_given_up_by_its_holder_only(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(monkeypatch, b"another's")
    ownership.give_up(ownership.new_mark(own_ray=False))
    assert store.value == b"another's"
    ownership.give_up(b"another's")
    assert store.value is None


def test_a_ray_that_ends_with_its_up_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ownership.new_mark(own_ray=True)
    store = Store(monkeypatch, theirs)
    with pytest.raises(Unavailable, match="--replace: the Ray at there ends with the `up` that started it"):
        ownership.take(ownership.new_mark(own_ray=False), "there", replace=True)
    assert store.value == theirs


def test_what_fails_halfway_gives_up_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """The application that is there is ended in any case: it takes no requests any more."""
    store, deleted = Store(monkeypatch, b"another's"), list[str]()
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr(ownership.serve, "delete", lambda name, _blocking: deleted.append(name))
    monkeypatch.setattr("cluster.ops.draining.finish", lambda *_: None)
    there = SimpleNamespace(applications={"twotower": None})
    monkeypatch.setattr(ownership.serve, "status", lambda: there)
    monkeypatch.setattr("cluster.cli.up._START_SLACK_S", 0.0)
    monkeypatch.setattr("cluster.ops.deployment._STOP_S", 0.1)
    up = Up(load_config(None, ["cluster.drain_timeout_s=0.1"]), "there", verbose=False, replace=True)
    with pytest.raises(Unavailable, match=r"--replace: the running application has not ended within 0\.1 s"):
        up._take_place()
    deployment.take_down(up._mark)
    assert store.value is None and deleted == ["twotower"] * 2


def test_serve_is_asked_nothing_once_ray_has_been_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that ends an application may outlive Ray by a moment."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(ownership.serve, "status", lambda: pytest.fail("this joins another Ray, or starts one"))
    assert deployment._gone(0.0)


def test_an_up_whose_application_is_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.cli.up._WATCH_S", 0.0)
    monkeypatch.setattr("cluster.ops.deployment.progress", lambda mark: Progress(0, 0, lost="somebody has deleted it"))
    up = Up(load_config(None), "auto", verbose=False)
    for waits in (up._watch, up._wait_until_ready):
        with pytest.raises(Unavailable, match="this `up` has lost its application: somebody has deleted it"):
            waits()
