"""Any bytes as a call's message: an answer, or a refusal that names what is wrong; and the next call is answered."""

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.faces.grpc.service import SERVICE
from cluster.faces.grpc.strict_protobuf import parse_message
from cluster.runs.generation import Generation
from tests.cluster.fakes import ScriptedCells
from tests.cluster.fuzz.wire import broken, messages
from tests.cluster.test_grpc import details_of
from tests.cluster.test_http import TEXT
from twotower.errors import InvalidRequest
from twotower.pb.twotower.v1 import generation_pb2 as pb

pytestmark = pytest.mark.slow

CASES, MANY, PARTS = 300, 10_000, 5
LONGEST = 256
REFUSED = ("not a readable", "wrong type", "UTF-8")  # words of what is refused before anybody looks at values
# What a case begins with, so that many are whole requests.
WHOLE: dict[str, tuple[Message, ...]] = {
    "Generate": (pb.GenerateRequest(text="Hi"), pb.GenerateRequest(token_ids=pb.TokenIds(ids=[76, 109]))),
    "GenerateStream": (
        pb.GenerateRequest(text="Hi"),
        pb.GenerateRequest(text="Hi", n=3),
        pb.GenerateRequest(text="Hi", trace=True, logprobs=1, params=pb.DecodingParams(mode=pb.MODE_VERIFIED)),
    ),
    "Score": (pb.ScoreRequest(prompt_text="Hi", continuation_text="there"),),
}


@dataclass(frozen=True)
class Call:
    """`method` is a descriptor. It is shown so that a failure can be repeated."""

    method: Any
    data: bytes

    @property
    def path(self) -> str:
        return f"/{SERVICE.full_name}/{self.method.name}"

    def __repr__(self) -> str:
        return f"Call({self.method.name}, bytes.fromhex({self.data.hex()!r}))"


def kind_of(descriptor: Any) -> type[Message]:
    kind: type[Message] = getattr(pb, descriptor.name)
    return kind


@st.composite
def calls(draw: st.DrawFn) -> Call:
    method = draw(st.sampled_from(list(SERVICE.methods)))
    beginnings = [b"", *(whole.SerializeToString() for whole in WHOLE.get(method.name, ()))]
    begun, rest = draw(st.sampled_from(beginnings)), draw(broken(messages(method.input_type)))
    return Call(method, begun + rest)


def fuzzed(cases: int) -> Any:
    """The same cases each time where they are few."""
    loose = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large)
    few = cases == CASES
    return settings(max_examples=cases, deadline=None, derandomize=few, database=None, suppress_health_check=loose)


@fuzzed(CASES)
@given(call=calls())
async def test_some(
    channel: grpc.aio.Channel,
    service: Generation,
    cells: ScriptedCells,
    caplog: pytest.LogCaptureFixture,
    call: Call,
) -> None:
    await is_answered_well(channel, service, cells, caplog, call)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
@fuzzed(MANY // PARTS)
@given(call=calls())
async def test_many(
    channel: grpc.aio.Channel,
    service: Generation,
    cells: ScriptedCells,
    caplog: pytest.LogCaptureFixture,
    call: Call,
    part: int,
) -> None:
    """In parts, each with cases of its own."""
    await is_answered_well(channel, service, cells, caplog, call)


async def is_answered_well(
    channel: grpc.aio.Channel, service: Generation, cells: ScriptedCells, caplog: pytest.LogCaptureFixture, call: Call
) -> None:
    cells.requests.clear()
    try:
        answers = await asked(channel, call)
    except grpc.aio.AioRpcError as error:
        is_refused_well(error)
        assert cells.requests == []
    else:
        for answer in answers:
            is_whole(answer)
        is_an_answer(call.method.name, answers)
    assert (cells.open, service.admission.running) == (0, 0)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    plain = await asked(channel, Call(SERVICE.methods_by_name["Generate"], WHOLE["Generate"][0].SerializeToString()))
    assert plain[0].text == TEXT


async def asked(channel: grpc.aio.Channel, call: Call) -> list[Any]:
    read = kind_of(call.method.output_type).FromString
    if call.method.server_streaming:
        return [answer async for answer in channel.unary_stream(call.path, None, read)(call.data, timeout=30)]
    return [await channel.unary_unary(call.path, None, read)(call.data, timeout=30)]


def is_refused_well(error: grpc.aio.AioRpcError) -> None:
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    bad = details_of(error, error_details_pb2.BadRequest)
    assert isinstance(bad, error_details_pb2.BadRequest) and bad.field_violations
    assert all(one.field and one.description for one in bad.field_violations)
    assert 0 < len(error.details() or "") <= 1000 and "Traceback" not in (error.details() or "")


def is_whole(message: Message) -> None:
    """Nothing in it that its descriptor does not know."""
    size = message.ByteSize()
    message.DiscardUnknownFields()
    assert message.ByteSize() == size


def is_an_answer(method: str, answers: list[Any]) -> None:
    """As the .proto's comments have it."""
    first = answers[0]
    match method:
        case "Generate":
            for answer in (first, *first.others):
                assert len(answer.likelihoods) in (0, len(answer.token_ids))
            is_finished(first.finished, len(first.token_ids))
        case "GenerateStream":
            for choice in range(1 + max(answer.choice for answer in answers)):
                is_a_stream([answer for answer in answers if answer.choice == choice])
        case "Score":
            assert len(first.token_ids) == len(first.log_probs) == len(first.is_greedy) > 0
        case "GetModelInfo":
            assert first.model_name == "fake"


def is_a_stream(answers: list[Any]) -> None:
    """Of one of the answers that a call asks for."""
    blocks = [answer.block for answer in answers if answer.HasField("block")]
    starts = [sum(len(block.token_ids) for block in blocks[:place]) for place in range(len(blocks))]
    assert [block.start for block in blocks] == starts
    assert [answer.HasField("finished") for answer in answers] == [False] * (len(answers) - 1) + [True]
    is_finished(answers[-1].finished, sum(len(block.token_ids) for block in blocks))


def is_finished(finished: pb.Finished, tokens: int) -> None:
    assert finished.finish_reason != pb.FINISH_REASON_UNSPECIFIED and finished.mode != pb.MODE_UNSPECIFIED
    assert finished.usage.completion_tokens == tokens and finished.usage.prompt_tokens > 0 and finished.seed >= 0


def test_the_cases_are_of_all_kinds() -> None:
    """Or nothing would be tested: refused before protobuf's work and after it, taken, with fields of nobody's."""
    seen = Counter[str]()

    @fuzzed(CASES)
    @given(call=calls())
    def note(call: Call) -> None:
        try:
            _, left_out = parse_message(kind_of(call.method.input_type), call.data, LONGEST)
            seen["with unknown fields" if left_out else "read"] += 1
        except InvalidRequest as error:
            [*_, last] = error.problems
            seen[next((word for word in REFUSED if word in last.message), "other")] += 1
        seen[call.method.name] += 1

    note()
    assert {method.name for method in SERVICE.methods} < seen.keys()
    kinds = {kind: seen[kind] for kind in ("read", "with unknown fields", *REFUSED)}
    assert min(kinds.values()) >= CASES // 100 and kinds["read"] >= CASES // 4, kinds
