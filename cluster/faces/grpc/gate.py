"""The caller of a gRPC call. If keys are required, a call without a key is refused here."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health
from grpc_status import rpc_status

from cluster.faces.credentials import key_of
from cluster.faces.error_codes import describe
from cluster.faces.grpc.boundary import status_of
from cluster.runs.callers import Caller, KeyRefused
from cluster.runs.generation import Generation, drawn_id
from cluster.runs.labels import OWN_ID, REQUEST_ID, label_of

_OPEN = f"/{health.SERVICE_NAME}/"  # probes have no key


class Gate(grpc.aio.ServerInterceptor):
    """Refuses calls of all services but health."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        if not str(handler_call_details.method).startswith(_OPEN):
            try:
                self._generation.caller(_key(handler_call_details.invocation_metadata), "")
            except KeyRefused as error:
                return _refusal(error)
        return await continuation(handler_call_details)


def caller_of(generation: Generation, context: Any) -> Caller:
    """The caller by key, or else by the peer's address, such as ipv4:127.0.0.1:4711 or ipv6:[::1]:4711. Raises
    KeyRefused.
    """
    family, _, rest = str(context.peer() or "").partition(":")
    address = rest.rpartition(":")[0].strip("[]") if family in ("ipv4", "ipv6") else ""
    return generation.caller(_key(context.invocation_metadata()), address)


def _key(metadata: Any) -> str | None:
    return key_of([str(value) for name, value in metadata or () if name == "authorization"])


def _refusal(error: KeyRefused) -> Any:
    status = rpc_status.to_status(status_of(describe(error)))

    async def refuse(_: Any, context: Any) -> None:
        own_id, metadata = drawn_id(), dict(context.invocation_metadata() or ())
        names = (REQUEST_ID, label_of(str(metadata.get(REQUEST_ID, ""))) or own_id), (OWN_ID, own_id)
        await context.abort(status.code, status.details, (*names, *status.trailing_metadata))

    return grpc.stream_stream_rpc_method_handler(refuse)  # which does not wait for the client's message
