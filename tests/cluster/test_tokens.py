"""Text to token ids and back, over both faces, in the shapes that vLLM's clients read."""

import grpc
import httpx
import pytest

from cluster.faces.http.service import make_app
from tests.cluster.fakes import TEMPLATE, ScriptedCells, all_modes, generation, grpc_server, tokens
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1.generation_pb2_grpc import GenerationServiceStub as Stub

HI = tokens("Hi")
LONGEST = 256  # of the fake, whose tokens are bytes


async def test_tokenize_in_vllms_shape(http: httpx.AsyncClient) -> None:
    told = (await http.post("/tokenize", json={"prompt": "Hi", "model": "fake"})).json()
    assert told == {"count": 3, "max_model_len": 256, "tokens": [1, *HI], "token_strs": None}
    body = {"prompt": "Hi", "add_special_tokens": False, "return_token_strs": True}
    told = (await http.post("/tokenize", json=body)).json()
    assert told == {"count": 2, "max_model_len": 256, "tokens": [*HI], "token_strs": ["<0x48>", "<0x69>"]}


async def test_a_prompt_is_tokenized_as_a_completion_tokenizes_it(
    http: httpx.AsyncClient, cells: ScriptedCells
) -> None:
    ids = (await http.post("/tokenize", json={"prompt": "Hi 日本"})).json()["tokens"]
    await http.post("/v1/completions", json={"prompt": "Hi 日本", "max_tokens": 1})
    assert tuple(ids) == cells.requests[0].prompt_token_ids


async def test_detokenize_writes_special_tokens_out(http: httpx.AsyncClient) -> None:
    assert (await http.post("/detokenize", json={"tokens": [1, *HI, 2]})).json() == {"prompt": "<s>Hi</s>"}


async def test_nothing_is_a_text_too(http: httpx.AsyncClient) -> None:
    assert (await http.post("/tokenize", json={"prompt": ""})).json()["tokens"] == [1]
    assert (await http.post("/tokenize", json={"prompt": "", "add_special_tokens": False})).json()["count"] == 0
    assert (await http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_as_lm_eval_reads_a_remote_tokenizer(http: httpx.AsyncClient) -> None:
    info = (await http.get("/tokenizer_info")).json()
    assert info["chat_template"] == TEMPLATE
    assert info["eos_token"] == "</s>" and info["bos_token"] == "<s>" and info["tokenizer_class"] == "ByteTokenizer"
    assert info["text_prompt_gets_bos"] is True
    nothing: dict[str, list[str]] = {"before": [], "after": []}
    text = {"before": ["<s>"], "after": []}
    assert info["special_tokens_added"] == {
        "text_prompt": text,
        "chat": nothing,
        "token_ids": nothing,
        "continuation": nothing,
    }
    ids = (await http.post("/tokenize", json={"prompt": "one", "add_special_tokens": False})).json()["tokens"]
    assert (await http.post("/detokenize", json={"tokens": ids})).json()["prompt"] == "one"


@pytest.mark.parametrize(
    ("path", "fits", "wrong", "param", "words"),
    [
        ("tokenize", {"prompt": "a" * (LONGEST - 1)}, {"prompt": "a" * (LONGEST + 1)}, "prompt", "257 bytes of text"),
        (
            "tokenize",
            {"prompt": "a" * (LONGEST - 1)},
            {"prompt": "a" * LONGEST},
            "prompt",
            "257 tokens, wanted at most",
        ),
        ("detokenize", {"tokens": [5] * LONGEST}, {"tokens": [5] * (LONGEST + 1)}, "tokens", "257 tokens"),
        ("detokenize", {"tokens": [259]}, {"tokens": [5, 260]}, "tokens[1]", "from 0 to 259"),
        ("detokenize", {"tokens": [5]}, {"tokens": "5"}, "tokens", "wanted a list of token ids"),
        ("tokenize", {"prompt": "a"}, {"prompt": ["a"]}, "prompt", "wanted a string"),
        ("tokenize", {"prompt": "a"}, {}, "prompt", "wanted a prompt, which is a string, or messages"),
        ("tokenize", {"prompt": "a"}, {"prompt": "a", "add_special": True}, "add_special", "did you mean add_special_"),
        ("tokenize", {"prompt": "a", "model": "m"[:0]}, {"prompt": "a", "model": "gpt-4"}, "model", "wanted 'fake'"),
    ],
)
async def test_what_is_wrong_is_told(
    http: httpx.AsyncClient, path: str, fits: dict[str, object], wrong: dict[str, object], param: str, words: str
) -> None:
    assert (await http.post(f"/{path}", json=fits)).status_code == 200
    refused = await http.post(f"/{path}", json=wrong)
    error = refused.json()["error"]
    assert refused.status_code == (404 if param == "model" else 400)
    assert error["param"] == param and words in error["message"], error


async def test_over_grpc(stub: Stub) -> None:
    told = await stub.Tokenize(pb.TokenizeRequest(text="Hi", with_tokens=True))
    assert list(told.token_ids) == [1, *HI] and list(told.tokens) == ["<s>", "<0x48>", "<0x69>"]
    assert told.max_sequence_length == 256
    told = await stub.Tokenize(pb.TokenizeRequest(text="Hi", add_special_tokens=False))
    assert list(told.token_ids) == [*HI] and not told.tokens
    assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=pb.TokenIds(ids=[1, *HI])))).text == "<s>Hi"
    for call, field in (
        (stub.Tokenize(pb.TokenizeRequest(text="a" * 257)), "text"),
        (stub.Detokenize(pb.DetokenizeRequest(token_ids=pb.TokenIds(ids=[5, 260]))), "token_ids.ids[1]"),
        (stub.Detokenize(pb.DetokenizeRequest(token_ids=pb.TokenIds(ids=[5] * 257))), "token_ids"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details().startswith(f"{field}: ")


async def test_without_a_tokenizer(cells: ScriptedCells) -> None:
    service = generation(cells, with_tokenizer=False)
    transport = httpx.ASGITransport(make_app(service, all_modes))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as http:
        for response in (
            await http.post("/tokenize", json={"prompt": "a"}),
            await http.post("/detokenize", json={"tokens": [5]}),
            await http.get("/tokenizer_info"),
        ):
            assert response.status_code == 400 and "no tokenizer" in response.json()["error"]["message"]
    async with grpc_server(service) as (address, _), grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Stub(channel).Detokenize(pb.DetokenizeRequest(token_ids=pb.TokenIds(ids=[5])))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
