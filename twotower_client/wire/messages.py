"""The message classes of twotower.v1, made at import from the descriptor that `make proto` writes beside this file.

They are in a separate pool. Generated code uses the common pool, where another version's messages are an error, such as
the service's own stubs in one process with this client. It would also refuse older releases of protobuf.
"""

from pathlib import Path

from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

_pool = DescriptorPool()
_pool.AddSerializedFile(Path(__file__).with_name("generation.binpb").read_bytes())
DESCRIPTOR = _pool.FindFileContainingSymbol("twotower.v1.GenerationService")
for _name, _message in DESCRIPTOR.message_types_by_name.items():
    globals()[_name] = message_factory.GetMessageClass(_message)
for _name, _enum in DESCRIPTOR.enum_types_by_name.items():
    globals()[_name] = EnumTypeWrapper(_enum)
    globals().update({value.name: value.number for value in _enum.values})
