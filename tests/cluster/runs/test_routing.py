"""Serve's own choice by our ranks: replicas that are slow to say how long their queue is."""

import asyncio
import pickle
from collections import Counter

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from cluster.runs.messages import Wishes
from cluster.runs.routing import ElsewhereFirst

_CELL = DeploymentID("Cell", "app")
_CALLS = 12


class Replica:
    """As much of Serve's view of a replica as its router uses."""

    max_ongoing_requests = 100

    def __init__(self, name: str, answers_after_s: float) -> None:
        self.replica_id, self._answers_after_s = ReplicaID(name, _CELL), answers_after_s

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.sleep(self._answers_after_s)
        return 0


async def _chosen(router: ElsewhereFirst, wishes: Wishes) -> str:
    """The replica that Serve sends the next call to."""
    metadata = RequestMetadata(request_id="call", internal_request_id="call")  # one at a time
    call = PendingRequest(args=["request", 1.0, wishes], kwargs={}, metadata=metadata)
    replica = await router._choose_replica_for_request(call)
    router.on_send_request(replica.replica_id)
    return str(replica.replica_id.unique_id)


async def test_a_cell_that_is_slow_to_tell_serve_its_queue_gets_its_part_of_the_calls() -> None:
    """As on a busy machine. Each second a router has Serve ask anew, for it seeks a cell that it has no line to."""
    router = ElsewhereFirst(_CELL, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    replicas = [Replica("quick", 0.0), Replica("slow", 60.0)]
    router.update_replicas(replicas)  # type: ignore[arg-type]
    assert await _chosen(router, Wishes(frozenset({"quick", "slow"}))) == "quick", "the only one that answers"
    load = {"quick": 1, "slow": 0}
    chosen = Counter([await _chosen(router, Wishes(load=load)) for _ in range(_CALLS)])
    assert abs(load["quick"] + chosen["quick"] - chosen["slow"]) <= 1, chosen
    chosen = Counter([await _chosen(router, Wishes(frozenset({"slow"}), load=load)) for _ in range(_CALLS)])
    assert chosen == {"quick": _CALLS}, "one to avoid has to answer, whatever was heard of it"


async def test_many_routers_do_not_all_begin_with_the_same_cell() -> None:
    """Serve takes the first of those with the shortest queue, and Serve's controller tells all routers one order."""
    replicas = [Replica(f"cell{number}", 0.0) for number in range(50)]
    load = {replica.replica_id.unique_id: 0 for replica in replicas}
    chosen = Counter[str]()
    for _ in range(20):
        router = ElsewhereFirst(_CELL, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
        router.update_replicas(replicas)  # type: ignore[arg-type]
        chosen[await _chosen(router, Wishes(load=load))] += 1
    assert len(chosen) > 8, chosen  # of 20 that draw from 50, some 16


async def test_what_other_routers_send_is_heard_within_a_second() -> None:
    """Serve believes for ten seconds what it knows of a cell."""
    now = [0.0]
    router = ElsewhereFirst(
        _CELL, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True, get_curr_time_s=lambda: now[0]
    )
    router.update_replicas([Replica("a", 0.0), Replica("b", 0.0)])  # type: ignore[arg-type]
    first = Counter([await _chosen(router, Wishes(load={"a": 0, "b": 0})) for _ in range(4)])
    assert first == {"a": 2, "b": 2}
    now[0] = 1.5
    later = Counter([await _chosen(router, Wishes(load={"a": 9, "b": 2})) for _ in range(4)])
    assert later == {"b": 4}, "others have filled the first meanwhile"


async def test_of_many_cells_a_call_looks_at_some_and_at_all_where_those_have_no_room() -> None:
    replicas = [Replica(f"cell{number}", 0.0) for number in range(300)]
    names = [replica.replica_id.unique_id for replica in replicas]
    router = ElsewhereFirst(_CELL, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    router.update_replicas(replicas)  # type: ignore[arg-type]
    load = dict.fromkeys(names, 1)
    for lone in ("cell7", "cell299"):
        full = frozenset(names) - {lone}
        assert await _chosen(router, Wishes(full=full, load=load)) == lone, "the only one with room"
    metadata = RequestMetadata(request_id="call", internal_request_id="call")
    call = PendingRequest(args=[Wishes(load=load)], kwargs={}, metadata=metadata)
    [room] = await router.choose_replicas(list(replicas), call)  # type: ignore[arg-type]
    assert len(room) < 100


def test_what_a_router_knows_of_a_thousand_cells_does_not_travel_with_each_request() -> None:
    wishes = Wishes(frozenset({"a"}), frozenset({"b"}), {f"cell{number}": number for number in range(1000)})
    sent = pickle.dumps(wishes)
    assert len(sent) < 200 and pickle.loads(sent) == Wishes()
