"""The trace that a call belongs to, as its client or gateway says: W3C's two headers, which both faces take alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TraceParent:
    """As they came: whoever traces checks them. Empty where there are none."""

    traceparent: str = ""
    tracestate: str = ""

    @classmethod
    def of(cls, headers: Mapping[str, Any]) -> "TraceParent":
        """The trace parent in HTTP's headers or gRPC's metadata."""
        traceparent = headers.get("traceparent")
        return cls(str(traceparent), str(headers.get("tracestate", ""))) if traceparent else NO_PARENT


NO_PARENT = TraceParent()
