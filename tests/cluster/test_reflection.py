"""A client that knows no .proto: it learns all from reflection, in either version of its protocol."""

from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import reflection_pb2

from tests.cluster.test_http import TEXT

SERVICE = "twotower.v1.GenerationService"
VERSIONS = ("grpc.reflection.v1", "grpc.reflection.v1alpha")
CALLS: dict[str, dict[str, Any]] = {
    "Generate": {"text": "Hi", "params": {"mode": "MODE_AR", "maxNewTokens": 3}},
    "GenerateStream": {"text": "Hi", "params": {"maxNewTokens": 3}},
    "Score": {"promptText": "Hi", "continuationText": "there"},
    "Tokenize": {"text": "Hi"},
    "Detokenize": {"tokenIds": {"ids": [76, 109]}},
    "GetModelInfo": {},
}


async def reflected(channel: grpc.aio.Channel, version: str, **asked: str) -> Any:
    """The one answer to one question. The messages of both versions are the same on the wire."""

    async def questions() -> AsyncGenerator[Any, None]:
        yield reflection_pb2.ServerReflectionRequest(**asked)

    method = channel.stream_stream(
        f"/{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    [answer] = [answer async for answer in method(questions(), timeout=20)]
    return answer


async def pool_of(channel: grpc.aio.Channel, version: str, symbol: str) -> DescriptorPool:
    """The files that describe a symbol."""
    answer = await reflected(channel, version, file_containing_symbol=symbol)
    pool = DescriptorPool()
    for data in answer.file_descriptor_response.file_descriptor_proto:
        pool.Add(FileDescriptorProto.FromString(data))
    return pool


async def asked(channel: grpc.aio.Channel, method: Any, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of a method, whose messages are made from their descriptors."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kinds = [GetMessageClass(kind) for kind in (method.input_type, method.output_type)]
    request, read = ParseDict(body, kinds[0]()), kinds[1].FromString
    if method.server_streaming:
        stream = channel.unary_stream(path, kinds[0].SerializeToString, read)(request, timeout=20)
        return [MessageToDict(answer) async for answer in stream]
    return [MessageToDict(await channel.unary_unary(path, kinds[0].SerializeToString, read)(request, timeout=20))]


@pytest.mark.parametrize("version", VERSIONS)
async def test_every_service_is_listed_and_described(channel: grpc.aio.Channel, version: str) -> None:
    listed = (await reflected(channel, version, list_services="")).list_services_response.service
    names = {service.name for service in listed}
    assert names == {SERVICE, "grpc.health.v1.Health", *(f"{one}.ServerReflection" for one in VERSIONS)}
    for name in names:
        service = (await pool_of(channel, version, name)).FindServiceByName(name)
        assert service.full_name == name and service.methods


@pytest.mark.parametrize("version", VERSIONS)
async def test_every_method_is_called_from_descriptors_alone(channel: grpc.aio.Channel, version: str) -> None:
    service = (await pool_of(channel, version, SERVICE)).FindServiceByName(SERVICE)
    answers = {method.name: await asked(channel, method, CALLS[method.name]) for method in service.methods}
    assert answers.keys() == CALLS.keys()
    [whole] = answers["Generate"]
    assert whole["text"] == TEXT[:3] and whole["finished"]["mode"] == "MODE_AR"
    assert "".join(event.get("block", {}).get("text", "") for event in answers["GenerateStream"]) == TEXT[:3]
    assert answers["GenerateStream"][-1]["finished"]["finishReason"] == "FINISH_REASON_LENGTH"
    assert len(answers["Score"][0]["logProbs"]) == len("there")
    assert answers["Tokenize"][0]["tokenIds"] == [1, 76, 109] and answers["Detokenize"][0]["text"] == "Hi"
    assert answers["GetModelInfo"][0]["modelName"] == "fake"


@pytest.mark.parametrize("version", VERSIONS)
async def test_what_is_not_there_is_said(channel: grpc.aio.Channel, version: str) -> None:
    answer = await reflected(channel, version, file_containing_symbol="twotower.v1.NoSuchService")
    assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
