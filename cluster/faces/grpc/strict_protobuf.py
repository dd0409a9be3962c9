"""Parses a protobuf message from bytes, and names what protobuf would ignore silently or refuse without a name."""

from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

from cluster.faces.http.chat_messages import MAX_MESSAGES
from twotower.core import MAX_STOP_STRINGS
from twotower.errors import FieldError, InvalidRequest
from twotower.showing import one_line

MAX_FIELDS = 64  # fields of a message on the wire, each string of a list counted
_MAX_NAMED = 8
_ID_BYTES = 6  # bytes of a token id on the wire: five for the number, one for its field if ids are not packed
MAX_PARAMS = 48 * 1024  # bytes of an inner message without a prompt's token ids
_MAX_UNKNOWN = 16 * 1024  # bytes of unknown fields that are inspected: at most some thousands of fields
Found = TypeVar("Found")
_NAMES: dict[int, str] = {number: name for name, number in FieldDescriptorProto.Type.items()}


def parse_message(kind: type[Message], data: bytes, most_tokens: int) -> tuple[Message, list[str]]:
    """A message whose strings are UTF-8, and the paths of the first few ignored fields, which this version does not
    know. A known field of another type is refused. A message larger than any prompt of `most_tokens` needs is refused
    before protobuf, which holds Python's lock, makes lists of it. Raises InvalidRequest.
    """
    _check_sizes(kind, data, most_tokens)
    try:
        message = kind.FromString(data)
    except (DecodeError, ValueError) as error:
        raise InvalidRequest(_broken_texts(kind, data) or [_unreadable(kind, error)]) from None
    size = message.ByteSize()
    message.DiscardUnknownFields()
    unknown = size - message.ByteSize()
    if unknown > _MAX_UNKNOWN:
        got = f"got {unknown} bytes of fields that are unknown or of the wrong type"
        raise InvalidRequest.of("message", f"{got}, wanted at most {_MAX_UNKNOWN}")
    return message, _left_out(kind.FromString(data)) if unknown else []


def _check_sizes(kind: type[Message], data: bytes, most_tokens: int) -> None:
    """Check the number of fields, and the bytes of inner messages. Raises InvalidRequest."""
    known: Any = kind.DESCRIPTOR.fields_by_number
    for place, (number, at, size) in enumerate(_fields(data)):
        field = known.get(number)
        name = str(number) if field is None else field.name
        if place == MAX_FIELDS:
            raise InvalidRequest.of("message", f"got more than {MAX_FIELDS} fields; {name} is one of those above")
        if field is None or field.message_type is None:
            continue
        if field.message_type.name == "Chat":
            _check_chat(name, data[at : at + size])
        elif field.message_type.name != "TokenIds":
            if size > MAX_PARAMS:
                raise InvalidRequest.of(name, f"got {size} bytes, wanted at most {MAX_PARAMS}")
        elif size > _ID_BYTES * most_tokens:
            wanted = f"wanted at most {_ID_BYTES * most_tokens}: {most_tokens} tokens of no more than {_ID_BYTES} bytes"
            raise InvalidRequest.of(name, f"got {size} bytes, {wanted}")


def _check_chat(name: str, data: bytes) -> None:
    """Check the number of messages; the bound of all bytes limits their length. Raises InvalidRequest."""
    if sum(1 for _ in islice(_fields(data), MAX_MESSAGES + 1)) > MAX_MESSAGES:
        raise InvalidRequest.of(f"{name}.messages", f"got more than {MAX_MESSAGES} messages")


def _fields(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The fields of a message on the wire: number, place of the value, its bytes. Ends early at malformed bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                size = _varint(data, at)[1] - at
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case _:
                return
        yield key >> 3, at, size
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and the place after it."""
    number = 0
    for place, byte in enumerate(data[at : at + 10]):
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number, at + place + 1
    return number, len(data)


def _distinct(found: Iterator[Found]) -> list[Found]:
    """The first few, each once. Inspects no more than needed."""
    distinct = dict[Found, None]()
    for one in found:
        distinct[one] = None
        if len(distinct) == _MAX_NAMED:
            break
    return list(distinct)


def _unreadable(kind: type[Message], error: Exception) -> FieldError:
    return FieldError("message", f"not a readable {kind.DESCRIPTOR.full_name}: {one_line(str(error))}")


def _left_out(message: Message) -> list[str]:
    """Paths such as params.99, each once, the first few. Raises InvalidRequest for a known field of the wrong type."""
    unread = list(_unread_fields(message, ""))
    wrong = (FieldError(path, f"wrong type on the wire, wanted {_type_name(field)}") for path, field in unread if field)
    if problems := _distinct(wrong):
        raise InvalidRequest(problems)
    return _distinct(path for path, _ in unread)


def _unread_fields(message: Message, path: str) -> Iterator[tuple[str, Any]]:
    """Unknown field numbers, and known numbers with a wrong wire type, with their descriptors: protobuf keeps both
    unparsed.
    """
    for unread in UnknownFieldSet(message):  # type: ignore[attr-defined]
        field = message.DESCRIPTOR.fields_by_number.get(unread.field_number)
        yield f"{path}{unread.field_number if field is None else field.name}", field
    for inner, where in _messages_in(message, path):
        yield from _unread_fields(inner, where)


def _messages_in(message: Message, path: str) -> Iterator[tuple[Message, str]]:
    """Inner messages, each with the beginning of its path. A map holds none: its values are numbers."""
    for field, value in message.ListFields():
        if isinstance(value, Message):
            yield value, f"{path}{field.name}."
        elif field.message_type and not field.message_type.GetOptions().map_entry:
            yield from ((inner, f"{path}{field.name}[{place}].") for place, inner in enumerate(value))


def _type_name(field: Any) -> str:
    """As a .proto file spells it."""
    named = field.message_type or field.enum_type
    return str(named.full_name) if named else _NAMES[field.type].removeprefix("TYPE_").lower()


def _broken_texts(kind: type[Message], data: bytes) -> list[FieldError]:
    """String fields that are not UTF-8, found by parsing again with bytes instead of strings."""
    try:
        message = _with_bytes(kind.DESCRIPTOR).FromString(data)
    except DecodeError:
        return []
    return _distinct(_not_utf8(message, ""))


def _not_utf8(message: Message, path: str) -> Iterator[FieldError]:
    for inner, where in _messages_in(message, path):
        yield from _not_utf8(inner, where)
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_BYTES:
            for text in [value] if isinstance(value, bytes) else islice(value, MAX_STOP_STRINGS):
                try:
                    text.decode("utf-8")
                except UnicodeDecodeError as error:
                    yield FieldError(f"{path}{field.name}", f"not UTF-8: {error.reason} at byte {error.start}")


@cache
def _with_bytes(kind: Descriptor) -> type[Message]:
    """The same message type with bytes instead of strings, for a file without imports."""
    file = FileDescriptorProto()
    kind.file.CopyToProto(file)
    for field in (field for message in file.message_type for field in message.field):
        if field.type == FieldDescriptorProto.TYPE_STRING:
            field.type = FieldDescriptorProto.TYPE_BYTES
    pool = DescriptorPool()
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName(kind.full_name))
