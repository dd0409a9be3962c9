"""The gRPC face: GenerationService, and the server that carries it with health and reflection."""

from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.generation import Generation
from cluster.grpc_boundary import Boundary
from cluster.grpc_messages import (
    answer_message,
    ask_of,
    chunk_messages,
    model_info_message,
    score_ask_of,
    score_message,
)
from twotower.errors import ConfigError
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

REQUEST_ID = "x-request-id"
Context = Any  # grpc.aio.ServicerContext, generic only in its stubs
SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"]


class GenerationServicer(pb_grpc.GenerationServiceServicer):
    """Translates, delegates, translates back. Errors are the Boundary's business."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        deadline = self._generation.deadline(_timeout_of(context))
        ask = ask_of(request, _label_of(request, context))
        with self._generation.place([ask]):
            run = await self._generation.run(ask, deadline)
            return answer_message(await run.whole())

    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> None:
        deadline = self._generation.deadline(_timeout_of(context))
        ask = ask_of(request, _label_of(request, context))
        with self._generation.place([ask]):
            run = await self._generation.run(ask, deadline)
            # Writing waits for the client to read, and may wait for ever.
            async with deadline.over(), aclosing(run):
                async for chunk in run:
                    for message in chunk_messages(run, chunk):
                        await context.write(message)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        deadline, label = self._generation.deadline(_timeout_of(context)), _label_of(request, context)
        with self._generation.admission.place():
            run = await self._generation.score_run(score_ask_of(request, label), deadline)
            return score_message(run, await run.whole())

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        return model_info_message(self._generation.model)


class GrpcServer:
    """A grpc.aio server of this process. Several processes of one node share the port."""

    def __init__(
        self, generation: Generation, host: str, port: int, max_bytes: int = 4 * 2**20, ping_interval_s: float = 5.0
    ) -> None:
        """`ping_interval_s`: clients may ask as often as this whether the connection lives."""
        messages = {f"/{SERVICE.full_name}/{method.name}": _message(method) for method in SERVICE.methods}
        self._server = grpc.aio.server(
            interceptors=[Boundary(messages)],
            options=[
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", max_bytes),
                ("grpc.http2.min_ping_interval_without_data_ms", round(1000 * ping_interval_s)),
                ("grpc.keepalive_permit_without_calls", 1),  # without it: every two hours while no call runs
            ],
        )
        pb_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(generation), self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = _listen(self._server, host, port)

    async def start(self) -> None:
        """Answers from now on; not yet serving in the sense of grpc.health.v1."""
        await self.set_serving(False)
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 says of the server and of the service."""
        states = health_pb2.HealthCheckResponse
        for name in ("", SERVICE.full_name):
            await self._health.set(name, states.SERVING if serving else states.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """NOT_SERVING, no new calls; running ones have `grace_s` seconds to finish."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _listen(server: grpc.aio.Server, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"ingress.grpc_port: cannot listen on {address}; is the port taken?") from error


def _message(method: Any) -> type[Message]:
    kind: type[Message] = getattr(pb, method.input_type.name)
    return kind


def _label_of(request: Any, context: Context) -> str:
    """What the client calls this request: its field, else the metadata of a gateway; empty where neither says."""
    metadata = dict(context.invocation_metadata() or ())
    return str(request.request_id or metadata.get(REQUEST_ID, ""))


def _timeout_of(context: Context) -> float | None:
    remaining: Any = context.time_remaining()  # None without a deadline, whatever its stub says
    return None if remaining is None else float(remaining)
