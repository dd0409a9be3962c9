"""The boundary of our gRPC services: parses messages, returns google.rpc.Status with details, and names
ignored fields.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as PackedAny
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cluster.faces.error_codes import Failure, describe
from cluster.faces.grpc.messages import outside_problems
from cluster.faces.grpc.strict_protobuf import parse_message
from cluster.runs.labels import OWN_ID
from twotower.errors import Cancelled, InvalidRequest

Handler = Any  # grpc.RpcMethodHandler, generic only in its stubs
Metadata = tuple[tuple[str, str], ...]
Behaviour = Any  # an async method of a servicer: (message, context) -> message, or None when it streams

# Trailing metadata of a call: fields of its message that this version does not know and ignored.
IGNORED = "x-twotower-ignored-fields"
DOMAIN = "twotower.v1"  # the domain of the reasons in an ErrorInfo


class Boundary(grpc.aio.ServerInterceptor):
    """Hands parsed messages to a service's methods and turns their errors into statuses; no traceback leaves.

    Methods are coroutines; streaming methods write to their context. `messages` maps a full method name to its request
    type; calls of other services (health, reflection) pass unchanged. `most_tokens`: the maximum of a prompt.
    """

    def __init__(self, messages: dict[str, type[Message]], most_tokens: int) -> None:
        self._messages, self._most_tokens = messages, most_tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        kind = self._messages.get(str(handler_call_details.method))
        if kind is None or handler is None:
            return handler
        if handler.response_streaming:
            method = guarded(handler.unary_stream, kind, self._most_tokens)
            return grpc.unary_stream_rpc_method_handler(method, None, handler.response_serializer)
        method = guarded(handler.unary_unary, kind, self._most_tokens)
        return grpc.unary_unary_rpc_method_handler(method, None, handler.response_serializer)


def guarded(behaviour: Behaviour, kind: type[Message], most_tokens: int) -> Behaviour:
    """The method inside the boundary, which takes bytes instead of a message."""

    async def call(data: bytes, context: Any) -> Any:
        left_out: Metadata = ()
        try:
            message, paths = parse_message(kind, data, most_tokens)
            left_out = ((IGNORED, ",".join(paths)),) if paths else ()
            answer = await behaviour(message, context)
            if left_out:
                context.set_trailing_metadata((*(context.trailing_metadata() or ()), *left_out))
            return answer
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            names = (*(context.trailing_metadata() or ()), *left_out)
            failure = describe(_outside(error, kind), dict(names).get(OWN_ID, ""))
            status = rpc_status.to_status(status_of(failure))
            # An abort's metadata replace those that the method has set.
            await context.abort(status.code, status.details, (*names, *status.trailing_metadata))

    return call


def _outside(error: Exception, kind: type[Message]) -> Exception:
    """The error for the client."""
    if isinstance(error, InvalidRequest):
        return outside_problems(error, kind)
    if isinstance(error, grpc.aio.InternalError):  # of a write, which fails if the client has left
        return Cancelled("the client has gone")
    return error


def status_of(failure: Failure) -> status_pb2.Status:
    """google.rpc.Status: ErrorInfo for programs, BadRequest for wrong fields, QuotaFailure for a key's limit, RetryInfo
    if a retry makes sense.
    """
    status = status_pb2.Status(code=failure.code.grpc.value[0], message=failure.message)
    _attach(status, error_details_pb2.ErrorInfo(reason=failure.code.reason, domain=DOMAIN))
    if failure.problems:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=p.field, description=p.message) for p in failure.problems
        ]
        _attach(status, error_details_pb2.BadRequest(field_violations=violations))
    if failure.key is not None:
        violation = error_details_pb2.QuotaFailure.Violation(subject=f"key:{failure.key}", description=failure.message)
        _attach(status, error_details_pb2.QuotaFailure(violations=[violation]))
    if failure.retry_after_s is not None:
        delay = Duration(seconds=failure.retry_after_s)
        _attach(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _attach(status: status_pb2.Status, detail: Message) -> None:
    packed = PackedAny()
    packed.Pack(detail)
    status.details.append(packed)
