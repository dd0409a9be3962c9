"""The state of a router's files: whether a change could be taken, and when certificates end."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from cluster.certificates import Credentials
from cluster.rereading import Rereading
from cluster.runs.callers import Door, OpenDoor


@dataclass(frozen=True, slots=True)
class Files:
    """`door`: reads the file of keys. `certificates`: those of TLS; `shown_over_http`: as they were when this router
    started, because Serve's proxies read theirs only once.
    """

    door: Door
    certificates: Rereading[Credentials] | None = None
    shown_over_http: Credentials | None = None

    def faults(self) -> Mapping[str, str]:
        """The error of each configured file; empty if there is none."""
        keys = {} if isinstance(self.door, OpenDoor) else {"keys": self.door.fault}
        return keys if self.certificates is None else {**keys, "certificates": self.certificates.fault}

    def ends(self) -> Mapping[str, datetime]:
        """The earliest end of each face's certificates."""
        over_http = {} if self.shown_over_http is None else {"http": self.shown_over_http.until}
        return over_http if self.certificates is None else {**over_http, "grpc": self.certificates.now.until}

    def told(self) -> tuple[str, ...]:
        """The present faults."""
        return tuple(fault for fault in self.faults().values() if fault)


NO_FILES = Files(OpenDoor())
