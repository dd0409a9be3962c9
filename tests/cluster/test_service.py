"""The whole service on a real Ray: same tokens as the reference, nothing left behind, nothing harmed."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import psutil
import pytest
from google.rpc import error_details_pb2

from cluster.config import ServiceConfig
from cluster.ops import deployment
from tests.cluster.listening import ports_of, said_by
from tests.cluster.service import Service, running_service
from tests.cluster.test_grpc import details_of
from tests.goldens import causal_request, diffusion_request, vendored
from twotower.core import Mode, Request
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.pb.twotower.v1 import generation_pb2_grpc as pb_grpc
from twotower_client import Block, Client, Finished, Round, Step
from twotower_client.asking import Options

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

LONG: dict[str, Any] = {"max_new_tokens": 900, "ignore_eos": True}
ROUNDS = 8
AT_ONCE = 300


@pytest.fixture(scope="module")
def service(ray_cluster: None) -> Iterator[Service]:
    with running_service() as running:
        yield running


def golden_requests() -> list[tuple[Request, list[int]]]:
    wanted = []
    for prompt in vendored("tt_moe").prompts:
        for mode in (Mode.AR, Mode.MOCK_AR, Mode.VERIFIED, Mode.AUTO):
            wanted.append((causal_request(prompt, mode), prompt[str(mode)]["tokens"]))
        for case in prompt["cases"]:
            if case["eos_token_id"] is None:
                wanted.append((diffusion_request(prompt, case), case["output"]))
    return wanted


def as_message(request: Request) -> pb.GenerateRequest:
    params = request.params
    message = pb.DecodingParams(
        mode=f"MODE_{params.mode.upper()}", max_new_tokens=params.max_new_tokens, ignore_eos=params.ignore_eos
    )
    if params.mode is Mode.DIFFUSION:
        message.block_size, message.steps_per_block = params.block_size, params.steps_per_block
        message.confidence_threshold = params.confidence_threshold
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=request.prompt_token_ids), params=message)


def as_json(request: Request) -> dict[str, Any]:
    params = request.params
    diffusion: dict[str, Any] = {"mode": params.mode}
    if params.mode is Mode.DIFFUSION:
        diffusion |= {"block_size": params.block_size, "steps_per_block": params.steps_per_block}
        diffusion["confidence_threshold"] = params.confidence_threshold
    body = {"prompt": list(request.prompt_token_ids), "max_tokens": params.max_new_tokens}
    return body | {"ignore_eos": params.ignore_eos, "diffusion": diffusion}


def test_the_client_gets_the_same_over_both_faces(service: Service) -> None:
    prompt = vendored("tt_moe").prompts[0]
    wanted, ids = prompt["verified"]["tokens"], prompt["tokens"]
    told = []
    for url in (f"grpc://{service.grpc}", f"http://{service.http}"):
        with Client(url, timeout_s=60) as client:
            options: Options = {"mode": "verified", "max_new_tokens": len(wanted), "ignore_eos": True}
            answer = client.complete(ids, **options, logprobs=0)
            with client.stream(ids, **options, trace=True) as stream:
                kinds = {type(event) for event in stream}
            assert list(answer.token_ids) == wanted == list(stream.token_ids)
            assert kinds == {Block, Step, Round, Finished} and client.ready().modes["verified"]
            score = client.score(ids, wanted)
            assert [one.log_prob for one in answer.likelihoods] == pytest.approx(score.log_probs, abs=1e-3)
            assert client.is_alive() and all(score.is_greedy)
            told.append((answer.usage, client.model().checkpoint_fingerprint, score.token_ids))
    assert told[0] == told[1]


async def test_golden_tokens_over_both_faces_all_modes_at_once(service: Service) -> None:
    wanted = golden_requests()
    async with (
        grpc.aio.insecure_channel(service.grpc) as channel,
        httpx.AsyncClient(base_url=f"http://{service.http}", timeout=60) as http,
    ):
        stub = pb_grpc.GenerationServiceStub(channel)

        async def whole(request: Request) -> list[int]:
            return list((await stub.Generate(as_message(request))).token_ids)

        async def streamed(request: Request) -> list[int]:
            events = [event async for event in stub.GenerateStream(as_message(request))]
            assert events[-1].HasField("finished")
            return [token for event in events for token in event.block.token_ids]

        async def posted(request: Request) -> list[int]:
            response = await http.post("/v1/completions", json=as_json(request))
            assert response.status_code == 200, response.text
            tokens: list[int] = response.json()["choices"][0]["token_ids"]
            return tokens

        async def posted_stream(request: Request) -> list[int]:
            body = (await http.post("/v1/completions", json=as_json(request) | {"stream": True})).text
            events = [json.loads(line[6:]) for line in body.splitlines() if line and not line.endswith("[DONE]")]
            return [token for event in events for token in event["choices"][0]["token_ids"]]

        for way in (whole, streamed, posted, posted_stream):
            results = await asyncio.gather(*(way(request) for request, _ in wanted[:40]))
            assert results == [tokens for _, tokens in wanted[:40]], way.__name__
    await service.all_free()


async def test_a_trace_is_the_released_codes_steps_over_both_faces(service: Service) -> None:
    prompt = vendored("tt_moe").prompts[0]
    [case, *_] = [case for case in prompt["cases"] if case["eos_token_id"] is None]
    request = diffusion_request(prompt, case)
    wanted = [step["committed"] for step in case["trace"]]
    size = request.params.block_size
    async with (
        grpc.aio.insecure_channel(service.grpc) as channel,
        httpx.AsyncClient(base_url=f"http://{service.http}", timeout=60) as http,
    ):
        stub = pb_grpc.GenerationServiceStub(channel)
        message = as_message(request)
        message.trace = True
        events = [event async for event in stub.GenerateStream(message)]
        steps = [event.step for event in events if event.HasField("step")]
        assert [[place - step.start for place in step.positions] for step in steps] == wanted
        assert [(step.start // size, step.step) for step in steps] == [(s["block"], s["step"]) for s in case["trace"]]
        assert [token for event in events for token in event.block.token_ids] == case["output"]
        body = as_json(request) | {"stream": True}
        body["diffusion"]["trace"] = True
        lines = (await http.post("/v1/completions", json=body)).text.splitlines()
        named = [json.loads(lines[n + 1][6:]) for n, line in enumerate(lines) if line == "event: twotower.trace"]
        assert [told["step"]["positions"] for told in named] == [list(step.positions) for step in steps]
        message = as_message(causal_request(prompt, Mode.VERIFIED))
        message.trace = True
        events = [event async for event in stub.GenerateStream(message)]
        rounds = [event.round for event in events if event.HasField("round")]
        tokens = [token for r in rounds for token in (*r.draft[: r.num_accepted], r.token_id)]
        assert rounds and prompt["verified"]["tokens"][1 : 1 + len(tokens)] == tokens
    await service.all_free()


async def test_likelihoods_of_all_modes_are_the_scorers(service: Service) -> None:
    prompt = vendored("tt_moe").prompts[0]
    requests = [causal_request(prompt, mode) for mode in (Mode.AR, Mode.MOCK_AR, Mode.VERIFIED)]
    requests.append(diffusion_request(prompt, prompt["cases"][0]))
    async with httpx.AsyncClient(base_url=f"http://{service.http}", timeout=60) as http:

        async def told_and_scored(request: Request) -> tuple[list[float], list[float]]:
            [choice] = (await http.post("/v1/completions", json=as_json(request) | {"logprobs": 20})).json()["choices"]
            assert all(20 <= len(top) <= 21 for top in choice["logprobs"]["top_logprobs"])
            score = {"prompt": list(request.prompt_token_ids), "continuation": choice["token_ids"]}
            scored = (await http.post("/v1/score", json=score)).json()["log_probs"]
            return choice["logprobs"]["token_logprobs"], scored

        for told, scored in await asyncio.gather(*map(told_and_scored, requests)):
            assert told == pytest.approx(scored, abs=1e-4)
        text = [*prompt["tokens"], *prompt["ar"]["tokens"]]
        echo = {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
        [choice] = (await http.post("/v1/completions", json=echo)).json()["choices"]
        scored = (await http.post("/v1/score", json={"prompt": text[:1], "continuation": text[1:]})).json()["log_probs"]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(scored, abs=1e-4)
    await service.all_free()


async def test_scores_beside_generation(service: Service) -> None:
    """The golden logits' own log-probabilities, while requests of every mode run; cancelled ones free their room."""
    model = vendored("tt_moe")
    wanted = golden_requests()[:20]
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)

        async def score(prompt: dict[str, Any]) -> None:
            first, *rest = prompt["tokens"]
            request = pb.ScoreRequest(
                prompt_token_ids=pb.TokenIds(ids=[first]), continuation_token_ids=pb.TokenIds(ids=rest)
            )
            answer = await stub.Score(request)
            log_probs_LV = model.tensors[f"{prompt['id']}.ctx_logits"].log_softmax(-1)
            own = [log_probs_LV[place, token].item() for place, token in enumerate(rest)]
            assert list(answer.token_ids) == rest and list(answer.log_probs) == pytest.approx(own, abs=1e-3)
            assert answer.sum_log_prob == pytest.approx(sum(own), abs=1e-2)
            assert list(answer.is_greedy) == [log_probs_LV[p].argmax().item() == token for p, token in enumerate(rest)]

        async def generate(request: Request, tokens: list[int]) -> None:
            assert list((await stub.Generate(as_message(request))).token_ids) == tokens

        await asyncio.gather(*map(score, model.prompts), *(generate(*pair) for pair in wanted))
        long = pb.ScoreRequest(
            prompt_token_ids=pb.TokenIds(ids=[5]),
            continuation_token_ids=pb.TokenIds(ids=[5 + n % 90 for n in range(1000)]),
        )
        for _ in range(ROUNDS):
            call = stub.Score(long)
            await asyncio.sleep(0.01)
            call.cancel()
        await service.all_free(within_s=2.0)
        assert len((await stub.Score(long)).log_probs) == 1000
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Score(long, timeout=0.001)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await service.all_free()


@pytest.mark.parametrize("mode", ["diffusion", "mock_ar", "ar", "verified", "auto"])
async def test_a_grpc_client_that_leaves_frees_both_towers(service: Service, mode: str) -> None:
    params = pb.DecodingParams(mode=f"MODE_{mode.upper()}", **LONG)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]), params=params)
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        for number in range(ROUNDS):
            if number % 2:
                # On a busy machine it may be over before its first event.
                call = stub.GenerateStream(request, timeout=0.3)
                assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            else:
                call = stub.GenerateStream(request)
                await call.read()
                assert (await service.stats()).running == 1
                call.cancel()
                assert await call.code() is grpc.StatusCode.CANCELLED
            await service.all_free(within_s=2.0)
        waiting = stub.Generate(request)
        await asyncio.sleep(0.2)
        waiting.cancel()
        await service.all_free(within_s=2.0)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_http_client_that_leaves_frees_both_towers(service: Service, stream: bool) -> None:
    body = {"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 900, "ignore_eos": True, "stream": stream}
    body["diffusion"] = {"confidence_threshold": 1.0}  # a token a step: still running when its first block comes
    for _ in range(ROUNDS):
        async with httpx.AsyncClient(base_url=f"http://{service.http}") as http:
            if stream:
                async with http.stream("POST", "/v1/completions", json=body) as response:
                    lines = response.aiter_lines()  # one that nobody holds closes the response
                    await anext(lines)
                    assert (await service.stats()).running == 2
            else:
                posting = asyncio.create_task(http.post("/v1/completions", json=body))
                while (await service.stats()).running < 2:
                    assert not posting.done(), posting.result().text
                    await asyncio.sleep(0.01)
                posting.cancel()
                await asyncio.gather(posting, return_exceptions=True)
        await service.all_free(within_s=2.0)


async def test_a_deadline_over_http(service: Service) -> None:
    async with httpx.AsyncClient(base_url=f"http://{service.http}") as http:
        body = {"prompt": [5, 6, 7], "max_tokens": 900, "ignore_eos": True}
        response = await http.post("/v1/completions", json=body, headers={"x-request-timeout": "0.2"})
        assert response.status_code == 504 and response.json()["error"]["type"] == "deadline_exceeded_error"
    await service.all_free(within_s=2.0)


async def test_bad_input_leaves_the_service_unharmed(service: Service) -> None:
    async with (
        grpc.aio.insecure_channel(service.grpc) as channel,
        httpx.AsyncClient(base_url=f"http://{service.http}") as http,
    ):
        stub = pb_grpc.GenerationServiceStub(channel)
        for content in (b"", b"{", b'{"prompt": "\xff"}', b'{"prompt": [5], "temperature": NaN}', b"[" * 100_000):
            assert (await http.post("/v1/completions", content=content)).status_code == 400
        for fields in ({"prompt": []}, {"prompt": [128]}, {"prompt": [5], "max_tokens": 5000}, {"prompt": "text"}):
            response = await http.post("/v1/completions", json=fields)
            assert response.status_code == 400 and response.json()["error"]["param"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[128])))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await http.post("/v1/completions", json={"prompt": [5]})).status_code == 200
        assert (await http.get("/ready")).status_code == 200
    await service.all_free()


async def test_more_than_fits_is_queued_or_refused_and_all_end(service: Service) -> None:
    """300 at once: each is answered, or refused with a hint when to come again."""
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), params=pb.DecodingParams(max_new_tokens=16))
        calls = [stub.Generate(request) for _ in range(AT_ONCE)]
        told = await asyncio.gather(*calls, return_exceptions=True)
    refused = [one for one in told if isinstance(one, grpc.aio.AioRpcError)]
    assert {error.code() for error in refused} <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all(details_of(error, error_details_pb2.RetryInfo) is not None for error in refused)
    answered = [one.token_ids for one in told if isinstance(one, pb.GenerateResponse)]
    assert len(answered) + len(refused) == AT_ONCE and len(answered) >= 80 and len(set(map(tuple, answered))) == 1
    await service.all_free()


async def test_the_same_over_http(service: Service) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://{service.http}", timeout=60, limits=limits) as http:
        body = {"prompt": [5], "max_tokens": 16}
        told = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(AT_ONCE)))
    refused = [answer for answer in told if answer.status_code == 429]
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    answered = [answer.json()["choices"][0]["token_ids"] for answer in told if answer.status_code == 200]
    assert len(answered) + len(refused) == AT_ONCE and len(answered) >= 80 and len(set(map(tuple, answered))) == 1
    await service.all_free()


async def test_a_call_of_more_prompts_than_the_cell_can_queue(service: Service) -> None:
    async with httpx.AsyncClient(base_url=f"http://{service.http}", timeout=60) as http:
        body = {"prompt": [[5 + place % 100] for place in range(256)], "max_tokens": 4, "ignore_eos": True}
        response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert [len(choice["token_ids"]) for choice in response.json()["choices"]] == [4] * 256
    await service.all_free()


def _cell_replica() -> int:
    """The process id of this Ray's only cell: another worker of the tests may have a Ray of its own."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()[:1]).startswith("ray::ServeReplica:twotower:Cell"):
                found.append(process.pid)
    [cell] = found
    return cell


@pytest.mark.parametrize("killed", ["tower", "cell"])
async def test_a_run_goes_on_on_the_replacement_of_what_was_killed(service: Service, killed: str) -> None:
    """Of the only cell: the stream stands still until there is another."""
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]), params=pb.DecodingParams(**LONG))
    tower = int((await service.stats()).homes[0]["pid"])
    victim = tower if killed == "tower" else _cell_replica()
    async with grpc.aio.insecure_channel(service.grpc) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        undisturbed = list((await stub.Generate(request)).token_ids)
        call, token_ids = stub.GenerateStream(request), list[int]()
        async with asyncio.timeout(150):
            async for event in call:
                if not token_ids:
                    os.kill(victim, signal.SIGKILL)
                token_ids += event.block.token_ids
    assert token_ids == undisturbed
    assert int((await service.stats()).homes[0]["pid"]) != tower


def test_a_cell_that_fits_nowhere_is_named(ray_cluster: None) -> None:
    config = ServiceConfig.parse({"cell": {"placement": "split", "device": "cpu", "gpus_per_tower": 99}})
    assert str(deployment.shortage(config)).startswith("1 cell wants 198 GPUs where Ray has ")


async def test_every_port_asks_who_is_there(service: Service) -> None:
    """But those that operations.md says do not. Ray's ports do so because its token is on, which `up` sees to."""
    faces = {int(address.rpartition(":")[2]): address for address in (service.http, service.grpc)}
    ports = [port for port in ports_of(psutil.Process()) if port.port not in faces]
    answers = zip(ports, await asyncio.gather(*map(said_by, ports)), strict=True)
    said = {port: word for port, word in answers if word != "gone"}
    expected = {"gRPC UNAUTHENTICATED", "HTTP 401", "HTTP 200 metrics", "nothing"}
    assert not {port: word for port, word in said.items() if word not in expected}
    by_process = {(port.process.split(".")[0], word) for port, word in said.items()}
    assert {
        ("ray::ServeReplica:twotower:Router", "gRPC UNAUTHENTICATED"),
        ("ray::ServeReplica:twotower:Cell", "gRPC UNAUTHENTICATED"),
        ("ray::ServeReplica:twotower:Router", "nothing"),  # the cells' line, which has wanted its token
        ("ray::ContextActor", "nothing"),  # what torch opens, on loopback
    } <= by_process, by_process
    mute = [port for port, word in said.items() if word == "nothing" and not port.is_towers]
    assert all(port.process.startswith("ray::ServeReplica:twotower:Router") for port in mute), mute
