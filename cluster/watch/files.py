"""The state of a router's files: whether a change could be taken, and when certificates end."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from cluster.certificates import Credentials
from cluster.rereading import Rereading
from cluster.runs.callers import Door, OpenDoor
from cluster.watch.shown import ShownOverHttp


@dataclass(frozen=True, slots=True)
class Files:
    """`door`: who knows of the file of keys. `certificates`: those of TLS, which gRPC shows; `shown_over_http`: what
    another process shows, the HTTP proxy of this node."""

    door: Door
    certificates: Rereading[Credentials] | None = None
    shown_over_http: ShownOverHttp | None = None

    def faults(self) -> Mapping[str, str]:
        """The error of each configured file; empty if there is none."""
        keys = {} if isinstance(self.door, OpenDoor) else {"keys": self.door.fault}
        return keys if self.certificates is None else {**keys, "certificates": self.certificates.fault}

    def ends(self) -> Mapping[str, datetime]:
        """The end of each face's certificates, as far as it is known."""
        ends = {} if self.certificates is None else {"grpc": self.certificates.now.until}
        if self.shown_over_http is not None and self.shown_over_http.until is not None:
            ends["http"] = self.shown_over_http.until
        return ends

    def told(self) -> tuple[str, ...]:
        """The present faults."""
        return tuple(fault for fault in self.faults().values() if fault)


NO_FILES = Files(OpenDoor())
