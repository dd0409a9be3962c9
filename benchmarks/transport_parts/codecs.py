"""What one event of 16 ids costs to write and to read, by codec, in one process."""

import timeit
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from twotower.core import BlockEvent, RequestId
from twotower.wire import Codec, from_json, to_json

_EVENT = BlockEvent(RequestId("answer-00000001"), 32, tuple(range(200, 216)), 5, 1)
_RUN = 7


@dataclass(frozen=True, slots=True)
class Cost:
    nbytes: int
    encode_s: float
    decode_s: float


Pair = tuple[Callable[[], bytes], Callable[[bytes], object]]


def _json() -> Pair:
    codec: Codec[BlockEvent] = Codec(BlockEvent)
    return lambda: to_json([_RUN, codec.plain(_EVENT)]), lambda data: codec.message(from_json(data)[1])


def _dataclasses() -> Pair:
    from benchmarks.transport_parts.messages import Block, decode_all, encode

    return lambda: encode([Block(_RUN, _EVENT)]), decode_all


def _structs() -> Pair:
    import msgspec

    class Flat(msgspec.Struct, tag="b", array_like=True, frozen=True):
        run: int
        request_id: str
        start: int
        token_ids: tuple[int, ...]
        num_steps: int
        num_blocks: int
        finish_reason: str | None = None
        margin: float | None = None

    e = _EVENT
    encode = msgspec.msgpack.Encoder().encode
    return (
        lambda: encode([Flat(_RUN, e.request_id, e.start, e.token_ids, e.num_steps, e.num_blocks)]),
        msgspec.msgpack.Decoder(list[Flat]).decode,
    )


def _protobuf() -> Pair:
    from twotower.pb.twotower.v1.generation_pb2 import CommittedBlock, GenerateStreamResponse

    e = _EVENT

    def encode() -> bytes:
        block = CommittedBlock(start=e.start, token_ids=e.token_ids, num_steps=e.num_steps, num_blocks=e.num_blocks)
        return bytes(GenerateStreamResponse(request_id=e.request_id, block=block).SerializeToString())

    def decode(data: bytes) -> BlockEvent:
        read = GenerateStreamResponse.FromString(data)
        b = read.block
        return BlockEvent(RequestId(read.request_id), b.start, tuple(b.token_ids), b.num_steps, b.num_blocks)

    return encode, decode


CODECS: dict[str, tuple[str, Callable[[], Pair]]] = {
    "JSON, `twotower.wire`": ("json", _json),
    "msgpack by msgspec, the project's dataclasses in tagged structs": ("msgspec", _dataclasses),
    "msgpack by msgspec, flat structs": ("msgspec", _structs),
    "protobuf, to and from the dataclass": ("google.protobuf", _protobuf),
}


def costs(number: int) -> dict[str, Cost]:
    """Of every codec that is installed."""
    found: dict[str, Cost] = {}
    for name, (package, make) in CODECS.items():
        if _is_installed(package):
            encode, decode = make()
            data = encode()
            decode(data)
            seconds = [
                timeit.timeit(encode, number=number),
                timeit.timeit(lambda d=decode, b=data: d(b), number=number),
            ]
            found[name] = Cost(len(data), seconds[0] / number, seconds[1] / number)
    return found


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package above it is missing
        return False
