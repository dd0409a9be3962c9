"""Which cell Serve sends a call to: one with room, and none that the call avoids, while there is any."""

from collections.abc import Sequence

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.runs import kept
from cluster.runs.messages import Wishes


class ElsewhereFirst(RequestRouter):
    """Cells by a call's `Wishes`: those with room, else full ones, else those to avoid; of each kind the least loaded.

    Serve hears late of what other routers send (a queue's length, when it next asks) and that a cell hangs
    (`health_check_timeout_s`). A router hears each second how full a cell is, knows after three that it hangs, and a
    run knows which cells have refused it. A cell that is avoided has to answer before it gets a call after all.

    A cell whose queue Serve does not know gets no call while another's is known: Serve asks for it in passing and waits
    0.1 s, which on a busy machine may be too short every time. So a router tells Serve what it has heard itself.
    """

    def update_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        """Serve says which cells there are."""
        super().update_replicas(list(replicas))
        kept.cells = frozenset(replica.replica_id.unique_id for replica in replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups, the first of which is tried first. Serve picks the one with the shortest queue, as it last heard."""
        wishes = _wishes(pending_request)
        room, full, avoided = list[RunningReplica](), list[RunningReplica](), list[RunningReplica]()
        for replica in candidate_replicas:
            cell = replica.replica_id.unique_id
            (avoided if cell in wishes.avoid else full if cell in wishes.full else room).append(replica)
        for replica in avoided:
            self.on_replica_actor_unavailable(replica.replica_id)  # forget what it said; it is asked again
        for replica in (*room, *full):
            load = wishes.load.get(replica.replica_id.unique_id)
            if load is not None and self.replica_queue_len_cache.get(replica.replica_id) is None:
                self.on_new_queue_len_info(replica.replica_id, load)
        return [rank for rank in (room, full, avoided) if rank]


def _wishes(request: PendingRequest | None) -> Wishes:
    last = request.args[-1] if request is not None and request.args else None
    return last if isinstance(last, Wishes) else Wishes()
