"""Fields of a newer client's message: ignored, and told in the trailing metadata."""

from typing import Any

import grpc
import pytest

from cluster.faces.grpc.boundary import IGNORED
from cluster.faces.grpc.strict_protobuf import parse_message
from tests.cluster.fakes import ScriptedCells
from tests.cluster.test_http import TEXT
from twotower.errors import InvalidRequest
from twotower.pb.twotower.v1 import generation_pb2 as pb

SERVICE = "/twotower.v1.GenerationService"
NEW, NEW_INSIDE = b"\x98\x06\x01", b"\x22\x03\x98\x06\x01"  # field 99; params with a field 99
PLAIN = pb.GenerateRequest(text="Hi").SerializeToString()


def told_by(metadata: Any) -> str | None:
    return dict(metadata).get(IGNORED)


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (PLAIN, None),
        (PLAIN + NEW, "99"),
        (PLAIN + NEW_INSIDE, "params.99"),
        (PLAIN + 3 * NEW + NEW_INSIDE, "99,params.99"),
    ],
    ids=["none", "one", "a parameter", "one several times, and a parameter"],
)
@pytest.mark.parametrize("streaming", [False, True])
async def test_it_is_answered_and_told(
    channel: grpc.aio.Channel, cells: ScriptedCells, sent: bytes, told: str | None, streaming: bool
) -> None:
    if streaming:
        stream = channel.unary_stream(f"{SERVICE}/GenerateStream")(sent)
        events = [pb.GenerateStreamResponse.FromString(event) async for event in stream]
        text, metadata = "".join(event.block.text for event in events), await stream.trailing_metadata()
    else:
        call = channel.unary_unary(f"{SERVICE}/Generate")(sent)
        text, metadata = pb.GenerateResponse.FromString(await call).text, await call.trailing_metadata()
    assert text == TEXT and told_by(metadata) == told
    assert dict(metadata)["x-twotower-id"] == cells.requests[0].id


async def test_a_method_without_ids_tells_it_too(channel: grpc.aio.Channel) -> None:
    call = channel.unary_unary(f"{SERVICE}/GetModelInfo")(NEW)
    assert pb.GetModelInfoResponse.FromString(await call).model_name == "fake"
    assert told_by(await call.trailing_metadata()) == "99"


async def test_a_refusal_tells_it_too(channel: grpc.aio.Channel, cells: ScriptedCells) -> None:
    wrong = pb.GenerateRequest(text="Hi", params=pb.DecodingParams(temperature=-1)).SerializeToString()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(f"{SERVICE}/Generate")(wrong + NEW)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "temperature: got -1" in (caught.value.details() or "") and "99" not in (caught.value.details() or "")
    assert told_by(caught.value.trailing_metadata()) == "99" and cells.requests == []


def test_the_first_few_are_told() -> None:
    fields = b"".join(_number(100 + place) for place in range(20))
    _, paths = parse_message(pb.GenerateRequest, PLAIN + fields, 256)
    assert paths == [str(100 + place) for place in range(8)]


def test_more_than_any_client_is_newer_by_is_refused() -> None:
    inside = b"\x98\x06\x01" * (16 * 1024 // 3)
    sized = b"\x22" + bytes([len(inside) & 127 | 128, len(inside) >> 7 & 127 | 128, len(inside) >> 14])
    _, paths = parse_message(pb.GenerateRequest, PLAIN + sized + inside, 256)
    assert paths == ["params.99"]
    with pytest.raises(InvalidRequest, match=r"message: got 16387 bytes of fields that are unknown.*at most 16384"):
        parse_message(pb.GenerateRequest, PLAIN + sized + inside + NEW, 256)


def test_a_known_field_of_another_type_is_no_newer_client_s() -> None:
    with pytest.raises(InvalidRequest, match=r"params\.mode: wrong type on the wire, wanted twotower") as caught:
        parse_message(pb.GenerateRequest, PLAIN + NEW + b"\x22\x02\x0a\x00", 256)
    assert len(caught.value.problems) == 1


def _number(number: int) -> bytes:
    """A field of this number, above 15, with the value 1."""
    key = number << 3
    return bytes([key & 127 | 128, key >> 7, 1])
