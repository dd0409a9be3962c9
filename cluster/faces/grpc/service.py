"""The gRPC face: GenerationService, and the server that carries it with health and reflection."""

from collections.abc import Iterator, Set
from contextlib import ExitStack, aclosing, contextmanager
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster.certificates import Credentials
from cluster.faces.grpc.asked import Asked, asked_of, tokenized_of, told_as
from cluster.faces.grpc.boundary import Boundary
from cluster.faces.grpc.gate import Gate, caller_of
from cluster.faces.grpc.messages import (
    answer_message,
    echo_message,
    model_info_message,
    piece_messages,
)
from cluster.faces.grpc.reflecting import enable_reflection
from cluster.faces.grpc.scores import continuations_of, score_message
from cluster.faces.grpc.tls import server_credentials
from cluster.rereading import Rereading
from cluster.runs.callers import Caller
from cluster.runs.choices import told_of
from cluster.runs.generation import Checked, Generation, drawn_id
from cluster.runs.labels import OWN_ID, REQUEST_ID, is_label, label_of
from cluster.runs.streams import drained
from cluster.runs.trace_parent import TraceParent
from twotower.core import Mode
from twotower.errors import ConfigError, InvalidRequest
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

Context = Any  # grpc.aio.ServicerContext, generic only in its stubs
SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"]


class GenerationServicer(pb_grpc.GenerationServiceServicer):
    """Translates, delegates, translates back. The Boundary handles errors."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        deadline = self._generation.deadline(_timeout_of(context))
        if request.trace:
            raise InvalidRequest.of("trace", "got true, wanted it only in GenerateStream")
        asked = asked_of(request, *_names(request, context), streams=False)
        checked, generation = self._generation.check(asked.ask), self._generation
        caller, parent = caller_of(generation, context), _parent_of(context)
        with self._held(asked, checked, caller):
            if asked.echo:
                run = await generation.echo_run(checked, asked.answers, deadline, caller, parent)
                await drained(generation.many([run]))
                return echo_message(asked, run, generation.token_texts)
            runs = await generation.runs(checked, asked.tries, deadline, caller, parent)
            await drained(generation.many(runs))
            told = await told_of(runs, asked.choices, asked.tries)
            return answer_message(asked, told, runs, generation.token_texts)

    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> None:
        deadline = self._generation.deadline(_timeout_of(context))
        asked = asked_of(request, *_names(request, context), streams=True)
        checked, generation = self._generation.check(asked.ask), self._generation
        caller = caller_of(generation, context)
        with self._held(asked, checked, caller):
            runs = await generation.runs(checked, asked.tries, deadline, caller, _parent_of(context))
            # A write waits until the client reads, perhaps for ever.
            async with deadline.over(), aclosing(generation.many(runs)) as pieces:
                async for place, piece in pieces:
                    for message in piece_messages(asked, place, runs[place], piece, generation.token_texts):
                        await context.write(message)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        generation = self._generation
        deadline = generation.deadline(_timeout_of(context))
        asked = continuations_of(request, *_names(request, context))
        checked, caller = asked.checked(generation), caller_of(generation, context)
        with generation.hold(checked, caller):
            runs = await asked.runs(generation, checked, deadline, caller, _parent_of(context))
            return score_message(runs, await asked.scores(generation, runs))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        prompts, deadline = self._generation.prompts, self._generation.deadline(_timeout_of(context))
        given, special = tokenized_of(request)
        names = {"prompt": "chat"} if request.HasField("chat") else {}
        with told_as(names), self._generation.hold(caller=caller_of(self._generation, context)):
            ids = await prompts.tokenized(given, deadline, special)
            strings = await prompts.tokens(ids, deadline) if request.with_tokens else ()
        longest = self._generation.model.limits.max_sequence_length
        return pb.TokenizeResponse(token_ids=ids, tokens=strings, max_sequence_length=longest)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        deadline = self._generation.deadline(_timeout_of(context))
        with self._generation.hold(caller=caller_of(self._generation, context)):
            text = await self._generation.prompts.detokenized(request.token_ids.ids, deadline)
        return pb.DetokenizeResponse(text=text)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        return model_info_message(self._generation.model)

    @contextmanager
    def _held(self, asked: Asked, checked: Checked, caller: Caller) -> Iterator[None]:
        """Holds room for all answers of a call."""
        with ExitStack() as held:
            with told_as(asked.names):
                held.enter_context(self._generation.hold([checked] * asked.tries, caller))
            yield


class GrpcServer:
    """A grpc.aio server of this process. Several processes of one node share the port."""

    def __init__(
        self,
        generation: Generation,
        host: str,
        port: int,
        max_bytes: int = 4 * 2**20,
        ping_interval_s: float = 5.0,
        certificates: Rereading[Credentials] | None = None,
        max_age_s: float = 300.0,
    ) -> None:
        """`ping_interval_s`: clients may ping as often as this. `certificates`: those for TLS; without them the server
        is plain. `max_age_s`: after this time a connection takes no more calls.
        """
        messages = {f"/{SERVICE.full_name}/{method.name}": _message(method) for method in SERVICE.methods}
        self._server = grpc.aio.server(
            interceptors=[Gate(generation), Boundary(messages, generation.model.limits.max_sequence_length)],
            options=[
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", max_bytes),
                ("grpc.http2.min_ping_interval_without_data_ms", round(1000 * ping_interval_s)),
                ("grpc.keepalive_permit_without_calls", 1),  # without it: every two hours while no call runs
                # No grace period, which would end running calls. By default they may take any time.
                ("grpc.max_connection_age_ms", round(1000 * max_age_s)),
            ],
        )
        pb_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(generation), self._server)
        self._health, self._modes = health.aio.HealthServicer(), generation.model.limits.modes
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        files = (pb.DESCRIPTOR, health_pb2.DESCRIPTOR)
        enable_reflection(self._server, (SERVICE.full_name, health.SERVICE_NAME), files)
        self.port = _listen(self._server, host, port, certificates)

    async def start(self) -> None:
        """Accepts calls from now on; not yet SERVING in the sense of grpc.health.v1."""
        await self.set_served(frozenset())
        await self._server.start()

    async def set_served(self, served: Set[Mode]) -> None:
        """Sets grpc.health.v1: for the server and the service, whether any mode is served; and for each mode."""
        states = health_pb2.HealthCheckResponse
        serving = {"": bool(served), SERVICE.full_name: bool(served)}
        serving |= {f"{SERVICE.full_name}.{mode}": mode in served for mode in self._modes}
        for name, serves in serving.items():
            await self._health.set(name, states.SERVING if serves else states.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING, no new calls; running ones have `grace_s` seconds to finish."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _listen(server: grpc.aio.Server, host: str, port: int, certificates: Rereading[Credentials] | None) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if certificates is not None:
            return server.add_secure_port(address, server_credentials(certificates))
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"ingress.grpc_port: cannot listen on {address}; is the port taken?") from error


def _message(method: Any) -> type[Message]:
    kind: type[Message] = getattr(pb, method.input_type.name)
    return kind


def _names(request: Any, context: Context) -> tuple[str, str]:
    """The client's label of this request (its field, else a gateway's metadata) and our id. They are sent when the call
    ends, also with an error. Nothing may be sent earlier, because a client that has received something does not retry.
    """
    metadata = dict(context.invocation_metadata() or ())
    label, own_id = request.request_id or label_of(str(metadata.get(REQUEST_ID, ""))), drawn_id()
    shown = label if is_label(label) else own_id
    context.set_trailing_metadata(((REQUEST_ID, shown), (OWN_ID, own_id)))
    return label, own_id


def _parent_of(context: Context) -> TraceParent:
    return TraceParent.of(dict(context.invocation_metadata() or ()))


def _timeout_of(context: Context) -> float | None:
    remaining: Any = context.time_remaining()  # None without a deadline, whatever its stub says
    return None if remaining is None else float(remaining)
