"""Which cell Serve sends a call to: one that it does not avoid, while there is any."""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class ElsewhereFirst(RequestRouter):
    """The least loaded of the cells that a call does not name in its last argument, else one that it does.

    Serve learns late that a cell hangs (`health_check_timeout_s`); a router knows after three seconds, and a run knows
    which cells have refused it. A cell that is avoided has to answer before it gets a call after all.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups, the first of which is tried first. Serve picks the one with the shortest queue, as it last heard."""
        avoided = frozenset(pending_request.args[-1]) if pending_request and pending_request.args else frozenset()
        ranks: tuple[list[RunningReplica], list[RunningReplica]] = [], []
        for replica in candidate_replicas:
            ranks[replica.replica_id.unique_id in avoided].append(replica)
        for replica in ranks[True]:
            self.on_replica_actor_unavailable(replica.replica_id)  # forget what it said; it is asked again
        return [rank for rank in ranks if rank]
