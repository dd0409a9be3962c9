"""Messages as bytes, made from their descriptors: valid ones and malformed ones.

They are made field by field, because protobuf writes no wrong message. Examples are a oneof twice, a number as a
string, an unknown field, half a message.
"""

import struct
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import strategies as st

VARINT, FIXED64, SIZED, FIXED32 = 0, 1, 2, 5
Bytes = st.SearchStrategy[bytes]
Value = tuple[int, bytes]  # the wire type, and the value as it is on the wire

_EDGES = (0, 1, 2, 4, 16, 20, 64, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, -1, -2, -(2**31), -(2**63))


def weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """One of them, each as often as its number says. `one_of` takes one that is named twice as one."""
    return st.sampled_from([one for weight, one in choices for _ in range(weight)]).flatmap(lambda one: one)


_INTEGERS = weighted((3, st.integers(0, 24)), (1, st.sampled_from(_EDGES)), (1, st.integers(-(2**63), 2**63 - 1)))
_REALS = weighted((2, st.floats(0, 1)), (1, st.sampled_from((0.0, -0.0, 2.0, -1.0, 1e308, 5e-324))), (1, st.floats()))
_TEXTS = st.text(max_size=12) | st.text(st.sampled_from("aä\0\n\u2028\U0001f600"), max_size=4)
_SCHEMAS = ('{"type": "object"}', '{"type": 1}', "{}", "[1")
_PATTERNS = st.sampled_from((*_SCHEMAS, "[a-z]+", "(", "(a{60000}){60000}", 'start: "a" | start "b"', "start:"))
_NO_TEXTS = st.sampled_from((b"\xff", b"a\xc3", b"\xed\xa0\x80"))  # a lone byte, half a character, half a pair
_STRINGS = weighted((10, (_TEXTS | _PATTERNS).map(str.encode)), (1, st.binary(max_size=6)), (1, _NO_TEXTS))
_STRAY_NUMBERS = st.sampled_from((0, 15, 29, 99, 1000, 19000, 2**29 - 1))


def varint(number: int) -> bytes:
    number &= 2**64 - 1
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes((*parts, number))


def sized(data: bytes) -> bytes:
    return varint(len(data)) + data


def field(number: int, value: Value) -> bytes:
    kind, data = value
    return varint(number << 3 | kind) + data


def messages(kind: Descriptor, most: int = 6) -> Bytes:
    """Mostly fields of its own with values of their types."""
    return st.lists(_fields(kind), max_size=most).map(b"".join)


@cache
def _fields(kind: Descriptor) -> Bytes:
    known = [_own(one) for one in kind.fields]
    stray = st.builds(field, _STRAY_NUMBERS, _values())
    if not known:
        return stray
    mistyped = st.builds(field, st.sampled_from([one.number for one in kind.fields]), _values())
    return weighted((12, st.one_of(known)), (1, mistyped), (1, stray))


@cache
def _own(one: FieldDescriptor) -> Bytes:
    number = st.just(one.number)
    if one.is_repeated and one.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE):
        packed = st.lists(_value(one).map(lambda value: value[1]), max_size=8)
        return st.builds(field, number, packed.map(lambda parts: (SIZED, sized(b"".join(parts)))))
    return st.builds(field, number, _value(one))


def _value(one: FieldDescriptor) -> st.SearchStrategy[Value]:
    match one.type:
        case FieldDescriptor.TYPE_DOUBLE:
            return _REALS.map(lambda real: (FIXED64, struct.pack("<d", real)))
        case FieldDescriptor.TYPE_FLOAT:
            return st.floats(width=32).map(lambda real: (FIXED32, struct.pack("<f", real)))
        case FieldDescriptor.TYPE_STRING | FieldDescriptor.TYPE_BYTES:
            return _STRINGS.map(lambda data: (SIZED, sized(data)))
        case FieldDescriptor.TYPE_MESSAGE:
            inside: Any = one.message_type
            return messages(inside).map(lambda data: (SIZED, sized(data)))
    return _INTEGERS.map(lambda number: (VARINT, varint(number)))


def _values() -> st.SearchStrategy[Value]:
    """Of any wire type: the two that begin and end groups, and the two that there are not, among them."""
    return st.one_of(
        _INTEGERS.map(lambda number: (VARINT, varint(number))),
        st.binary(max_size=9).map(lambda data: (SIZED, sized(data))),
        st.binary(min_size=8, max_size=8).map(lambda data: (FIXED64, data)),
        st.binary(min_size=4, max_size=4).map(lambda data: (FIXED32, data)),
        st.tuples(st.sampled_from((3, 4, 6, 7)), st.binary(max_size=4)),
    )


def broken(data: Bytes) -> Bytes:
    """The same with something behind it, or with its end cut off; one in four."""
    tails = st.builds(lambda whole, tail: whole + tail, data, st.binary(min_size=1, max_size=8))
    cuts = st.builds(lambda whole, length: whole[:length], data, st.integers(0, 40))
    return weighted((6, data), (1, tails), (1, cuts))
