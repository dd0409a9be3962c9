"""The cell to which Serve sends a call: one with room, and not one that the call avoids while there is another."""

import math
import random
from collections.abc import Sequence

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from cluster.runs import kept
from cluster.runs.messages import Wishes

_STALE_S = 1.0
_LOOKED_AT = 64  # the least loaded of so many is nearly the least loaded of a thousand


class ElsewhereFirst(RequestRouter):
    """Ranks cells by a call's `Wishes`: those with room, then full ones, then those to avoid; within each kind the
    least loaded first.

    Serve learns late of other routers' calls (a queue's length, at its next probe) and of a hung cell
    (`health_check_timeout_s`). A router learns each second how full a cell is, and after three seconds that it hangs. A
    run knows which cells have refused it. An avoided cell must answer a probe before it gets a call after all.

    A cell whose queue Serve does not know gets no call while another's is known. Serve probes it and waits 0.1 s, which
    on a busy machine may be too short every time. So a router gives Serve its own numbers, and once a second those of
    all cells. Otherwise Serve would learn of other routers' calls only after ten seconds.

    Serve takes the first of several cells with the shortest queue. With one order for all routers, all would take the
    same cell. So each call begins at another cell, and looks no further than needed.
    """

    _heard_at = -math.inf  # when Serve last got all cells' numbers

    def update_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        """Serve's list of the cells."""
        super().update_replicas(list(replicas))
        kept.cells = frozenset(replica.replica_id.unique_id for replica in replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of cells, the first of which is tried first. Within it Serve picks the cell with the shortest known
        queue.
        """
        wishes = _wishes(pending_request)
        first = random.randrange(len(candidate_replicas)) if candidate_replicas else 0
        candidates = [*candidate_replicas[first:], *candidate_replicas[:first]]
        self._hear_of_all(candidates, wishes)
        ranks = _ranked(candidates[:_LOOKED_AT], wishes)
        if not ranks[0] and len(candidates) > _LOOKED_AT:
            ranks = _ranked(candidates, wishes)
        room, full, avoided = ranks
        for replica in avoided:
            self.on_replica_actor_unavailable(replica.replica_id)  # drop its last answer, so that it is probed again
        for replica in (*room, *full):
            self._hear(replica, wishes, anew=False)
        return [rank for rank in ranks if rank]

    def _hear_of_all(self, candidates: Sequence[RunningReplica], wishes: Wishes) -> None:
        """Once a second, as often as cells' beats."""
        now = self._get_curr_time_s()
        if wishes.load and now - self._heard_at >= _STALE_S:
            self._heard_at = now
            for replica in candidates:
                if replica.replica_id.unique_id not in wishes.avoid:
                    self._hear(replica, wishes, anew=True)

    def _hear(self, replica: RunningReplica, wishes: Wishes, anew: bool) -> None:
        """`anew`: also if Serve believes to know the cell's queue."""
        load = wishes.load.get(replica.replica_id.unique_id)
        if load is not None and (anew or self.replica_queue_len_cache.get(replica.replica_id) is None):
            self.on_new_queue_len_info(replica.replica_id, load)


def _ranked(candidates: Sequence[RunningReplica], wishes: Wishes) -> tuple[list[RunningReplica], ...]:
    """The cells with room, the full ones, those to avoid."""
    room, full, avoided = list[RunningReplica](), list[RunningReplica](), list[RunningReplica]()
    for replica in candidates:
        cell = replica.replica_id.unique_id
        (avoided if cell in wishes.avoid else full if cell in wishes.full else room).append(replica)
    return room, full, avoided


def _wishes(request: PendingRequest | None) -> Wishes:
    last = request.args[-1] if request is not None and request.args else None
    return last if isinstance(last, Wishes) else Wishes()
