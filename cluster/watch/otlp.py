"""Sends spans to an OpenTelemetry collector named by the standard environment variables. Off without them."""

import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_FLUSH_MS = 2000


def provider() -> "TracerProvider | None":
    """A provider for this process only, not OpenTelemetry's global one, which Serve may set. OTEL_… variables also set
    sampling, headers and so on. None if no collector is named, or if the exporter is not installed, which is logged.
    """
    named = [name for name in ENDPOINTS if os.environ.get(name)]
    if not named or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        made = _exporting()
    except ImportError:
        logger.warning("%s is set, but there are no traces: wanted `pip install 'twotower[otel]'`", named[0])
        return None
    logger.info("traces go to %s", os.environ[named[0]])
    return made


def _exporting() -> "TracerProvider":
    """Imported only when needed: most services have no collector."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    service = Resource({"service.name": "twotower"}).merge(OTELResourceDetector().detect())
    made = TracerProvider(resource=Resource.create().merge(service))
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made


def finish(provider: "TracerProvider") -> None:
    """Send the remaining spans. Waits at most some seconds for a collector."""
    provider.force_flush(_FLUSH_MS)
