"""Serve's own choice by our ranks: replicas that are slow to say how long their queue is."""

import asyncio
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
    assert abs(chosen["quick"] - chosen["slow"]) <= 1, chosen
    chosen = Counter([await _chosen(router, Wishes(frozenset({"slow"}), load=load)) for _ in range(_CALLS)])
    assert chosen == {"quick": _CALLS}, "one to avoid has to answer, whatever was heard of it"
