"""Server reflection, for clients that know no .proto: both versions of its protocol, whose messages are the same."""

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection, reflection_pb2

File = Any  # google.protobuf.descriptor.FileDescriptor, which is two classes to the stubs
_OLDER, _NEWER = "grpc.reflection.v1alpha", "grpc.reflection.v1"
NAMES = (reflection.SERVICE_NAME, f"{_NEWER}.ServerReflection")


def enable_reflection(server: grpc.aio.Server, names: Sequence[str], files: Sequence[File]) -> None:
    """Describes the named services, which are in these files, and reflection itself. The files import
    only each other.
    """
    pool = DescriptorPool()
    for file in (*files, reflection_pb2.DESCRIPTOR):
        pool.Add(_proto(file))
    pool.Add(_newer(_proto(reflection_pb2.DESCRIPTOR)))
    told = (*names, *NAMES)
    reflection.enable_server_reflection(told, server, pool)
    # The library has only the older version.
    method = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(told, pool).ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(NAMES[1], {"ServerReflectionInfo": method})
    server.add_generic_rpc_handlers((handler,))


def _proto(file: File) -> FileDescriptorProto:
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    return proto


def _newer(file: FileDescriptorProto) -> FileDescriptorProto:
    """The description of the newer version: the older one's in another package."""
    file.name, file.package = "grpc/reflection/v1/reflection.proto", _NEWER
    for field in (field for message in file.message_type for field in message.field if field.type_name):
        field.type_name = field.type_name.replace(_OLDER, _NEWER)
    for method in (method for service in file.service for method in service.method):
        method.input_type = method.input_type.replace(_OLDER, _NEWER)
        method.output_type = method.output_type.replace(_OLDER, _NEWER)
    return file
