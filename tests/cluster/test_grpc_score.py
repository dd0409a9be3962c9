"""Scoring over gRPC, by scripted cells: what is scored, how text becomes tokens, what is refused, how it ends."""

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2

from tests.cluster.fakes import ScriptedCells, generation, grpc_server, tokens
from tests.cluster.test_grpc import details_of
from tests.cluster.test_http import raising
from twotower.errors import Cancelled, DeadlineExceeded, InvalidRequest, NumericalError, Overloaded, Unavailable
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc

Stub = pb_grpc.GenerationServiceStub


def ask(**fields: object) -> pb.ScoreRequest:
    return pb.ScoreRequest(**{"prompt_text": "Hi", "continuation_text": " there", **fields})


def ids(*token_ids: int) -> pb.TokenIds:
    return pb.TokenIds(ids=token_ids)


async def test_one_entry_for_each_token_of_the_continuation(stub: Stub) -> None:
    answer = await stub.Score(ask(request_id="s-1"))
    assert answer.request_id == "s-1" and answer.prompt_tokens == 3
    assert tuple(answer.token_ids) == tokens(" there")
    assert list(answer.log_probs) == pytest.approx([-token / 100 for token in tokens(" there")])
    assert list(answer.is_greedy) == [token % 2 == 0 for token in tokens(" there")]
    assert answer.sum_log_prob == pytest.approx(-sum(tokens(" there")) / 100)


async def test_only_the_prompt_gets_special_tokens_and_token_ids_are_taken_as_they_are(
    stub: Stub, cells: ScriptedCells
) -> None:
    await stub.Score(ask(priority=-7))
    await stub.Score(ask(prompt_token_ids=ids(7, 8)))
    await stub.Score(ask(continuation_token_ids=ids(2, 0)))
    assert [(request.token_ids, request.start, request.priority) for request in cells.scored] == [
        ((1, *tokens("Hi"), *tokens(" there")), 3, -7),
        ((7, 8, *tokens(" there")), 2, 0),
        ((1, *tokens("Hi"), 2, 0), 3, 0),
    ]


@pytest.mark.parametrize(
    "more",
    [
        {"more_continuation_texts": [" all", "!", *["?"] * 9]},
        {"more_continuation_token_ids": [ids(*tokens(" all")), ids(*tokens("!")), *[ids(*tokens("?"))] * 9]},
    ],
    ids=["texts", "ids"],
)
async def test_several_continuations_are_scored_each_on_its_own(
    stub: Stub, cells: ScriptedCells, more: dict[str, object]
) -> None:
    answer = await stub.Score(ask(request_id="s-1", priority=3, **more))
    plain = await stub.Score(ask())
    assert (answer.request_id, answer.prompt_tokens) == ("s-1", plain.prompt_tokens)
    assert (answer.token_ids, answer.log_probs, answer.is_greedy) == (
        plain.token_ids,
        plain.log_probs,
        plain.is_greedy,
    )
    assert len(answer.others) == 11
    for one, text in zip(answer.others, (" all", "!", *["?"] * 9), strict=True):
        assert tuple(one.token_ids) == tokens(text)
        assert list(one.log_probs) == pytest.approx([-token / 100 for token in tokens(text)])
        assert one.sum_log_prob == pytest.approx(-sum(tokens(text)) / 100) and len(one.is_greedy) == len(text)
    assert all(scored.start == 3 for scored in cells.scored)
    assert len({scored.id for scored in cells.scored}) == len(cells.scored) == 13 and cells.open == 0


async def test_a_drawn_id_and_the_deadline(stub: Stub, cells: ScriptedCells) -> None:
    assert (await stub.Score(ask(), timeout=20)).request_id.startswith("req-")
    await stub.Score(ask())
    assert 15 < cells.timeouts[0] < 21 and 59 < cells.timeouts[1] <= 60


async def test_text_that_cannot_fit_is_not_tokenized(stub: Stub, cells: ScriptedCells) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Score(ask(continuation_text="a" * 5000))
    assert "continuation: got 5000 bytes of text, wanted at most 256: 256 tokens of no" in caught.value.details()
    assert cells.scored == []


BAD: list[tuple[str, pb.ScoreRequest, list[str], str]] = [
    ("nothing", pb.ScoreRequest(), ["prompt", "continuation"], "missing, wanted"),
    ("no prompt", pb.ScoreRequest(continuation_text="a"), ["prompt"], "missing, wanted prompt_text or"),
    ("no continuation", pb.ScoreRequest(prompt_text="a"), ["continuation"], "wanted continuation_text or"),
    ("empty prompt", ask(prompt_text=""), ["prompt"], "got an empty prompt, wanted at least one token"),
    ("empty prompt ids", ask(prompt_token_ids=ids()), ["prompt"], "got an empty prompt"),
    ("empty continuation", ask(continuation_text=""), ["continuation"], "got an empty continuation"),
    ("empty ids", ask(continuation_token_ids=ids()), ["continuation"], "got an empty continuation"),
    ("both empty", pb.ScoreRequest(prompt_text="", continuation_text=""), ["prompt", "continuation"], "at least one"),
    ("prompt id", ask(prompt_token_ids=ids(5, 260)), ["prompt_token_ids.ids[1]"], "got 260, wanted a token id from 0"),
    ("id", ask(continuation_token_ids=ids(5, 6, 2**32 - 1)), ["continuation_token_ids.ids[2]"], "got 4294967295"),
    ("too long", ask(continuation_token_ids=ids(*[5] * 254)), ["continuation"], "wanted at most 256 together"),
    (
        "too long a prompt",
        ask(prompt_token_ids=ids(*[5] * 300)),
        ["prompt"],
        "got a prompt of 300 tokens, wanted at most 256",
    ),
    (
        "both kinds",
        ask(more_continuation_texts=["a"], more_continuation_token_ids=[ids(5)]),
        ["more_continuation_token_ids"],
        "got it beside more_continuation_texts, wanted one of them",
    ),
    ("empty text", ask(more_continuation_texts=["a", ""]), ["more_continuation_texts[1]"], "got an empty continuation"),
    (
        "long text",
        ask(more_continuation_texts=["a" * 255]),
        ["more_continuation_texts[0]"],
        "wanted at most 256 together",
    ),
    (
        "further id",
        ask(more_continuation_token_ids=[ids(5), ids(6, 260)]),
        ["more_continuation_token_ids[1].ids[1]"],
        "got 260",
    ),
    (
        "further ids",
        ask(more_continuation_token_ids=[ids(5), ids(*[5] * 254)]),
        ["more_continuation_token_ids[1]"],
        "wanted at most 256 together",
    ),
    ("priority", ask(priority=-(2**40)), ["priority"], "wanted an integer from -2147483648"),
    ("request_id", ask(request_id="a b"), ["request_id"], "printable ASCII"),
]


@pytest.mark.parametrize(("request_", "fields", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
async def test_bad_input_is_named(
    stub: Stub, cells: ScriptedCells, request_: pb.ScoreRequest, fields: list[str], words: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Score(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    bad = details_of(caught.value, error_details_pb2.BadRequest)
    assert isinstance(bad, error_details_pb2.BadRequest)
    assert [violation.field for violation in bad.field_violations] == fields
    assert all(words in violation.description for violation in bad.field_violations), bad
    assert cells.scored == []
    assert (await stub.Score(ask())).token_ids


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xff\xff", "not a readable twotower.v1.ScoreRequest"),
        (b"\x12\x02\xff\xfe", "prompt_text: not UTF-8: invalid start byte at byte 0"),
    ],
    ids=["not a message", "not UTF-8"],
)
async def test_broken_messages(channel: grpc.aio.Channel, cells: ScriptedCells, data: bytes, words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/twotower.v1.GenerationService/Score")(data)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and words in caught.value.details()
    assert cells.scored == []


async def test_without_a_tokenizer_only_token_ids(cells: ScriptedCells) -> None:
    async with (
        grpc_server(generation(cells, with_tokenizer=False)) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = Stub(channel)
        answer = await stub.Score(pb.ScoreRequest(prompt_token_ids=ids(5), continuation_token_ids=ids(6)))
        assert list(answer.token_ids) == [6]
        for refused, field in (
            (ask(continuation_token_ids=ids(6)), "prompt"),
            (ask(prompt_token_ids=ids(6)), "continuation"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Score(refused)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details().startswith(f"{field}: got text, but this checkpoint has no tokenizer")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Overloaded("full"), grpc.StatusCode.RESOURCE_EXHAUSTED, "full"),
        (Unavailable("gone"), grpc.StatusCode.UNAVAILABLE, "gone"),
        (DeadlineExceeded("not finished within 60 s"), grpc.StatusCode.DEADLINE_EXCEEDED, "not finished within 60 s"),
        (Cancelled("left"), grpc.StatusCode.CANCELLED, "left"),
        (NumericalError("NaN"), grpc.StatusCode.ABORTED, "NaN"),
        # The ledger's: more than the cell's whole cache.
        (InvalidRequest.of("token_ids", "too long"), grpc.StatusCode.INVALID_ARGUMENT, "continuation: too long"),
    ],
)
async def test_errors_have_their_codes(
    stub: Stub, cells: ScriptedCells, error: Exception, code: grpc.StatusCode, said: str
) -> None:
    cells.fail = raising(error, 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Score(ask())
    assert caught.value.code() is code and caught.value.details() == said
    retry = details_of(caught.value, error_details_pb2.RetryInfo)
    assert (retry is not None) == isinstance(error, Overloaded | Unavailable)
    assert cells.open == 0


@pytest.mark.parametrize("way", ["cancel", "deadline"])
async def test_a_client_that_leaves_frees_its_sequence(stub: Stub, cells: ScriptedCells, way: str) -> None:
    cells.pace_s = 5.0
    call = stub.Score(ask(), timeout=0.1 if way == "deadline" else None)
    waiting = asyncio.ensure_future(call)
    while not cells.open:
        await asyncio.sleep(0.001)
    if way == "cancel":
        call.cancel()
    async with asyncio.timeout(2):
        while cells.open:
            await asyncio.sleep(0.001)
    await asyncio.gather(waiting, return_exceptions=True)
