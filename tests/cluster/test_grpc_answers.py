"""What a gRPC call asks for beside its parameters: chats, several answers, the prompt again."""

import re

import grpc
import pytest

from tests.cluster.fakes import ScriptedCells, generation, grpc_server, tokens
from tests.cluster.test_grpc import Stub, ask
from tests.cluster.test_http import TEXT
from twotower.pb.twotower.v1 import generation_pb2 as pb

USER = pb.ChatMessage(role="user", content="Hi")


def chat(*messages: pb.ChatMessage) -> pb.Chat:
    return pb.Chat(messages=messages or [USER])


async def refusal(call: object) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            [_ async for _ in call]
        else:
            await call  # type: ignore[misc]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return str(caught.value.details())


async def test_a_chat_is_a_completion_of_what_its_template_makes(stub: Stub, cells: ScriptedCells) -> None:
    request = pb.GenerateRequest(chat=chat(), request_id="r", params=pb.DecodingParams(seed=1))
    whole = await stub.Generate(request)
    events = [event async for event in stub.GenerateStream(request)]
    assert whole.text == "".join(event.block.text for event in events) == TEXT and whole.request_id == "r"
    assert [request.prompt_token_ids for request in cells.requests] == [tokens("u: Hi\na:")] * 2
    assert list((await stub.Tokenize(pb.TokenizeRequest(chat=chat()))).token_ids) == list(tokens("u: Hi\na:"))


async def test_wrong_chats(stub: Stub, cells: ScriptedCells) -> None:
    for wrong, told in (
        (pb.Chat(), "chat: got"),
        (chat(pb.ChatMessage(role="tool", content="a")), "chat.messages[0].role: got"),
        (chat(USER, pb.ChatMessage(role="user", content="a", name="n" * 513)), "chat.messages[1].name: got"),
        (chat(*[USER] * 1025), "chat.messages: got more than 1024 messages"),
    ):
        assert told in await refusal(stub.Generate(pb.GenerateRequest(chat=wrong)))
        assert told in await refusal(stub.GenerateStream(pb.GenerateRequest(chat=wrong)))
        assert told in await refusal(stub.Tokenize(pb.TokenizeRequest(chat=wrong)))
    both = pb.TokenizeRequest(chat=chat(), text="a")
    assert "chat: got it beside text" in await refusal(stub.Tokenize(both))
    long = chat(pb.ChatMessage(role="user", content="a" * 300))
    assert "chat: " in await refusal(stub.Tokenize(pb.TokenizeRequest(chat=long)))
    assert not cells.requests


async def test_what_is_unknown_in_a_message_is_named(stub: Stub) -> None:
    message = pb.ChatMessage.FromString(USER.SerializeToString() + b"\x50\x01")  # field 10, a number
    call = stub.Generate(pb.GenerateRequest(chat=chat(message)))
    await call
    assert ("x-twotower-ignored-fields", "chat.messages[0].10") in tuple(await call.trailing_metadata())


async def test_without_a_template_chats_are_refused(cells: ScriptedCells) -> None:
    async with (
        grpc_server(generation(cells, template=None)) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        told = await refusal(Stub(channel).Generate(pb.GenerateRequest(chat=chat())))
        assert "chat: this checkpoint has no chat template" in told


async def test_what_several_answers_cost(stub: Stub, cells: ScriptedCells) -> None:
    one = await stub.Generate(ask())
    assert not one.others and not one.HasField("total_usage") and not one.HasField("prompt")
    cells.requests.clear()
    several = await stub.Generate(ask(n=2, best_of=3, params=pb.DecodingParams(max_new_tokens=4)))
    assert len(several.others) == 1 and len(cells.requests) == 3 and not several.likelihoods
    assert (several.total_usage.prompt_tokens, several.total_usage.completion_tokens) == (3, 12)
    assert several.finished.usage.completion_tokens == several.others[0].finished.usage.completion_tokens == 4
    assert re.fullmatch("req-[0-9a-f]{32}", several.request_id), "without an answer's place"


async def test_streams_tell_which_answer_an_event_is_of(stub: Stub) -> None:
    events = [event async for event in stub.GenerateStream(ask(n=2, params=pb.DecodingParams(max_new_tokens=4)))]
    assert sorted((event.choice, event.WhichOneof("event")) for event in events) == [
        (choice, kind) for choice in (0, 1) for kind in ("block", "finished")
    ]
    assert len({event.request_id for event in events}) == 1


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"n": 0}, "n: got 0"),
        ({"n": 257}, "n: got 257"),
        ({"n": 2, "best_of": 1}, "best_of: got 1, wanted at least n"),
        ({"best_of": 2, "logprobs": 21}, "logprobs: got 21"),
        ({"echo": True, "n": 2}, "echo: got true, wanted it only where n and best_of are 1"),
    ],
)
async def test_what_is_not_answered(stub: Stub, cells: ScriptedCells, fields: dict[str, int], told: str) -> None:
    assert told in await refusal(stub.Generate(ask(**fields)))
    assert not cells.requests


async def test_what_no_stream_tells(stub: Stub) -> None:
    assert "echo: got true, wanted it only of Generate" in await refusal(stub.GenerateStream(ask(echo=True)))
    assert "best_of: got 2, wanted n, which is 1, of a stream" in await refusal(stub.GenerateStream(ask(best_of=2)))
    echoed = pb.GenerateRequest(chat=chat(), echo=True)
    assert "echo: got true, wanted it only of text or token_ids" in await refusal(stub.Generate(echoed))
