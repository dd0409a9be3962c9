"""Which cell Serve sends a call to: one with room, and none that the call avoids, while there is any."""

import math
import random
from collections.abc import Sequence

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.runs import kept
from cluster.runs.messages import Wishes

_STALE_S = 1.0
_LOOKED_AT = 64  # of so many the least loaded is nearly that of a thousand


class ElsewhereFirst(RequestRouter):
    """Cells by a call's `Wishes`: those with room, else full ones, else those to avoid; of each kind the least loaded.

    Serve hears late of what other routers send (a queue's length, when it next asks) and that a cell hangs
    (`health_check_timeout_s`). A router hears each second how full a cell is, knows after three that it hangs, and a
    run knows which cells have refused it. A cell that is avoided has to answer before it gets a call after all.

    A cell whose queue Serve does not know gets no call while another's is known: Serve asks for it in passing and waits
    0.1 s, which on a busy machine may be too short every time. So a router tells Serve what it has heard itself, and
    each second of all cells: what other routers send there Serve would not hear for ten.

    Serve takes the first of several with the shortest queue. In one order for all routers that would be one cell for
    all of them, so each call begins somewhere else, and looks no further than it must.
    """

    _heard_at = -math.inf  # when it was told of all cells

    def update_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        """Serve says which cells there are."""
        super().update_replicas(list(replicas))
        kept.cells = frozenset(replica.replica_id.unique_id for replica in replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups, the first of which is tried first. Serve picks the one with the shortest queue, as it last heard."""
        wishes = _wishes(pending_request)
        first = random.randrange(len(candidate_replicas)) if candidate_replicas else 0
        candidates = [*candidate_replicas[first:], *candidate_replicas[:first]]
        self._hear_of_all(candidates, wishes)
        ranks = _ranked(candidates[:_LOOKED_AT], wishes)
        if not ranks[0] and len(candidates) > _LOOKED_AT:
            ranks = _ranked(candidates, wishes)
        room, full, avoided = ranks
        for replica in avoided:
            self.on_replica_actor_unavailable(replica.replica_id)  # forget what it said; it is asked again
        for replica in (*room, *full):
            self._hear(replica, wishes, anew=False)
        return [rank for rank in ranks if rank]

    def _hear_of_all(self, candidates: Sequence[RunningReplica], wishes: Wishes) -> None:
        """Once a second: cells' beats come so often."""
        now = self._get_curr_time_s()
        if wishes.load and now - self._heard_at >= _STALE_S:
            self._heard_at = now
            for replica in candidates:
                if replica.replica_id.unique_id not in wishes.avoid:
                    self._hear(replica, wishes, anew=True)

    def _hear(self, replica: RunningReplica, wishes: Wishes, anew: bool) -> None:
        """`anew`: also where Serve believes to know how much the cell holds."""
        load = wishes.load.get(replica.replica_id.unique_id)
        if load is not None and (anew or self.replica_queue_len_cache.get(replica.replica_id) is None):
            self.on_new_queue_len_info(replica.replica_id, load)


def _ranked(candidates: Sequence[RunningReplica], wishes: Wishes) -> tuple[list[RunningReplica], ...]:
    """With room, full, to avoid."""
    room, full, avoided = list[RunningReplica](), list[RunningReplica](), list[RunningReplica]()
    for replica in candidates:
        cell = replica.replica_id.unique_id
        (avoided if cell in wishes.avoid else full if cell in wishes.full else room).append(replica)
    return room, full, avoided


def _wishes(request: PendingRequest | None) -> Wishes:
    last = request.args[-1] if request is not None and request.args else None
    return last if isinstance(last, Wishes) else Wishes()
