"""What the clients ask and get: the same over both faces, blocking and with asyncio."""

import asyncio
from typing import Any

import pytest

from cluster.runs.choices import derived_seed
from tests.client.conftest import Asking
from tests.cluster.fakes import ScriptedCells, tokens
from tests.cluster.test_http import TEXT
from twotower.core import Mode
from twotower_client import MODES, Block, Finished, InvalidRequest, Round, Step, Usage

ALL = len(tokens(TEXT))


async def test_whole_answer_and_stream_in_every_mode(asking: Asking, cells: ScriptedCells) -> None:
    for mode in MODES:
        await _whole_and_stream(asking, cells, mode)


async def _whole_and_stream(asking: Asking, cells: ScriptedCells, mode: str) -> None:
    whole = await asking.complete("Hi", mode=mode, seed=7, request_id="r-1")
    events, stream = await asking.stream("Hi", mode=mode, seed=7, request_id="r-1")
    *blocks, end = events
    assert whole.text == stream.text == TEXT and whole.token_ids == stream.token_ids == tokens(TEXT)
    assert (whole.finish_reason, whole.seed, whole.mode, whole.request_id) == ("stop", 7, mode, "r-1")
    assert whole.usage == Usage(3, ALL, num_steps=20, num_blocks=10) and whole.service_id and whole.attempts == 1
    assert whole.usage.tokens_per_step == ALL / 20
    assert all(isinstance(block, Block) for block in blocks)
    assert [block.start for block in blocks] == list(range(0, 40, 4))
    assert [block.usage for block in blocks[:2]] == [Usage(0, 4, num_steps=2, num_blocks=1)] * 2
    assert end == stream.finished == Finished("stop", whole.usage, 7, mode)
    assert [request.params.mode for request in cells.requests[-2:]] == [Mode(mode)] * 2


async def test_every_parameter_reaches_the_cell(asking: Asking, cells: ScriptedCells) -> None:
    diffusion = {"block_size": 8, "steps_per_block": 4, "confidence_threshold": 0.0, "ignore_eos": False}
    await asking.complete([5, 6], max_new_tokens=9, mode="diffusion", temperature=0.5, priority=-7, **diffusion)
    await asking.complete("Hi", mode="ar", top_k=3, top_p=0.5, seed=0, stop_token_ids=[9], stop="things")
    await asking.complete("Hi", mode="auto", draft_steps=3, draft_threshold=0.25, floor="confidence")
    requests, (first, second, third) = cells.requests, (request.params for request in cells.requests)
    assert requests[0].prompt_token_ids == (5, 6) and [request.priority for request in requests] == [-7, 0, 0]
    assert (first.max_new_tokens, first.block_size, first.steps_per_block) == (9, 8, 4)
    assert (first.confidence_threshold, first.temperature, first.ignore_eos) == (0.0, 0.5, False)
    assert (second.mode, second.top_k, second.top_p, second.seed, second.stop_token_ids) == ("ar", 3, 0.5, 0, (9,))
    assert (third.draft_steps, third.draft_threshold, third.floor) == (3, 0.25, "confidence")


async def test_what_is_none_or_left_out_is_the_services(asking: Asking, cells: ScriptedCells) -> None:
    answer = await asking.complete("Hi", mode=None, max_new_tokens=None)
    assert cells.requests[0].params.max_new_tokens == 128 and answer.request_id.startswith("client-")


async def test_a_stop_string_ends_text_and_stream(asking: Asking) -> None:
    whole = await asking.complete("Hi", stop=["things", "wait"])
    events, stream = await asking.stream("Hi", stop=["things", "wait"])
    assert whole.text == stream.text == "All good " and whole.finish_reason == "stop"
    assert isinstance(events[-1], Finished) and events[-1].usage == whole.usage


async def test_likelihoods(asking: Asking) -> None:
    whole = await asking.complete("Hi", mode="diffusion", logprobs=2, max_new_tokens=4)
    events, _ = await asking.stream("Hi", mode="diffusion", logprobs=2, max_new_tokens=4)
    assert isinstance(events[0], Block) and events[0].likelihoods == whole.likelihoods
    assert [one.log_prob for one in whole.likelihoods] == pytest.approx([-token / 100 for token in tokens("All ")])
    assert [one.confidence for one in whole.likelihoods] == [0.5] * 4
    # Over HTTP the token itself is among them, and only texts are told.
    assert {-0.04, -0.05} <= {round(top.log_prob, 5) for top in whole.likelihoods[0].top}
    assert (await asking.complete("Hi", max_new_tokens=4)).likelihoods == ()


async def test_echo(asking: Asking, cells: ScriptedCells) -> None:
    answer = await asking.complete("Hi", echo=True, logprobs=0, max_new_tokens=4)
    assert answer.text == "HiAll " and answer.token_ids == (1, *tokens("HiAll "))
    assert answer.likelihoods[0].log_prob is None and len(answer.likelihoods) == 3 + 4
    told = [one.log_prob for one in answer.likelihoods[1:]]
    assert told == pytest.approx([-token / 100 for token in tokens("HiAll ")])
    prompt = await asking.complete("Hi", echo=True, logprobs=0, max_new_tokens=0)
    assert (prompt.text, prompt.token_ids, len(cells.requests)) == ("Hi", (1, *tokens("Hi")), 1)
    assert prompt.likelihoods == answer.likelihoods[:3] and prompt.usage == Usage(3)
    assert prompt.usage.tokens_per_step is None
    assert (await asking.complete("Hi", echo=True, max_new_tokens=4)).likelihoods == ()
    for refused in ({"n": 2}, {"best_of": 2}):
        with pytest.raises(InvalidRequest, match="echo: got true, wanted it only where n and best_of are 1"):
            await asking.complete("Hi", echo=True, **refused)


async def test_a_chat(asking: Asking, cells: ScriptedCells) -> None:
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi", "name": "me"}]
    whole = await asking.complete(chat, seed=7, max_new_tokens=8, logprobs=1, mode="ar")
    events, stream = await asking.stream(chat, seed=7, max_new_tokens=8, logprobs=1, mode="ar")
    first, second = cells.requests
    assert first.prompt_token_ids == second.prompt_token_ids == tokens("s: Be short.\nu: Hi\na:")
    assert whole.text == stream.text == TEXT[:8] and whole.token_ids == stream.token_ids == tokens(TEXT[:8])
    assert whole.usage == stream.finished.usage and whole.usage.prompt_tokens == len(first.prompt_token_ids)
    assert [block.start for block in events if isinstance(block, Block)] == [0, 4] and whole.seed == 7
    assert [one.log_prob for one in whole.likelihoods] == pytest.approx([-token / 100 for token in whole.token_ids])
    assert await asking.of("tokenize", chat) == first.prompt_token_ids
    assert await asking.of("tokenize", chat, add_special_tokens=True) == (1, *first.prompt_token_ids)
    await asking.complete(chat, max_new_tokens=4, add_special_tokens=True)
    assert cells.requests[-1].prompt_token_ids == (1, *first.prompt_token_ids)


async def test_wrong_chats(asking: Asking, cells: ScriptedCells) -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[0\].role: got .robot., wanted one of system"):
        await asking.complete([{"role": "robot", "content": "Hi"}])
    if asking.client.target.over_grpc:  # over HTTP the whole body is too long here
        with pytest.raises(InvalidRequest, match=r"chat.messages: got more than 1024 messages"):
            await asking.complete([{"role": "user", "content": "a"}] * 1025)
    for wrong in ({"role": "user"}, {"role": "user", "content": 5}, {"role": "user", "content": "a", "tool": 1}, "a"):
        with pytest.raises(InvalidRequest, match=r"messages\[1\]") as caught:
            await asking.complete([{"role": "user", "content": "a"}, wrong])
        assert caught.value.attempts == 0, "nothing was sent"
    with pytest.raises(InvalidRequest, match="echo"):
        await asking.complete([{"role": "user", "content": "a"}], echo=True)
    assert not cells.requests


@pytest.mark.parametrize("prompt", ["Hi", [{"role": "user", "content": "Hi"}]])
async def test_several_answers(asking: Asking, cells: ScriptedCells, prompt: Any) -> None:
    whole = await asking.complete(prompt, n=3, seed=7, max_new_tokens=8, logprobs=0)
    events, stream = await asking.stream(prompt, n=3, seed=7, max_new_tokens=8, logprobs=0)
    streamed = stream._gathering.answer()
    seeds = [derived_seed(7, place) for place in range(3)]
    assert (
        [one.seed for one in (whole, *whole.others)] == seeds == [request.params.seed for request in cells.requests[:3]]
    )
    assert [one.seed for one in (streamed, *streamed.others)] == seeds
    for one in (whole, *whole.others, streamed, *streamed.others):
        assert one.text == TEXT[:8] and one.token_ids == tokens(TEXT[:8]) and len(one.likelihoods) == 8
        assert one.usage.completion_tokens == 24 and one.usage.num_blocks == 6
        assert one.usage.prompt_tokens == len(cells.requests[0].prompt_token_ids)
    ends = [event for event in events if isinstance(event, Finished)]
    assert sorted(end.choice for end in ends) == [0, 1, 2] and {end.usage.completion_tokens for end in ends} == {8}
    blocks = [event for event in events if isinstance(event, Block)]
    assert sorted((block.choice, block.start) for block in blocks) == [(c, s) for c in range(3) for s in (0, 4)]


async def test_the_best_of_several(asking: Asking, cells: ScriptedCells) -> None:
    told = await asking.complete("Hi", n=1, best_of=3, seed=7, max_new_tokens=4)
    assert len(cells.requests) == 3 and not told.others and told.likelihoods == ()
    assert {request.logprobs for request in cells.requests} == {0} and told.usage.completion_tokens == 12
    for options in ({"n": 3, "best_of": 2}, {"n": 0}, {"n": 257}):
        with pytest.raises(InvalidRequest, match=r"best_of: got 2, wanted at least n|n: got (0|257)"):
            await asking.complete("Hi", **options)
    with pytest.raises(InvalidRequest, match="best_of: got 2, wanted it only without a stream"):
        await asking.stream("Hi", best_of=2)


async def test_a_stop_string_that_is_told(asking: Asking) -> None:
    whole = await asking.complete("Hi", stop="things", include_stop_str_in_output=True)
    _, stream = await asking.stream("Hi", stop="things", include_stop_str_in_output=True)
    assert whole.text == stream.text == "All good things"


async def test_steering_and_structure_reach_the_cell(asking: Asking, cells: ScriptedCells) -> None:
    steering = {"min_p": 0.25, "min_tokens": 3, "logit_bias": {7: -1.5}, "presence_penalty": 1.0}
    steering |= {"frequency_penalty": 0.5, "repetition_penalty": 1.5}
    await asking.complete("Hi", mode="ar", **steering)
    await asking.stream("Hi", mode="ar", **steering)
    for request in cells.requests:
        told = {name: getattr(request.params, name) for name in steering}
        assert {**told, "logit_bias": dict(told["logit_bias"])} == steering
    for described in ({"regex": ""}, {"json": {}, "regex": "a"}, {"xml": "a"}):
        with pytest.raises(InvalidRequest, match="structured_outputs"):
            await asking.complete("Hi", mode="ar", structured_outputs=described)


async def test_trace(asking: Asking) -> None:
    events, stream = await asking.stream("Hi", mode="verified", trace=True, max_new_tokens=4)
    first, second, round_, block, end = events
    assert isinstance(first, Step) and (first.start, first.size, first.step, first.positions) == (0, 4, 0, (0, 2))
    assert first.texts == ("A", "l") and first.confidence == (0.5, 0.5) and isinstance(second, Step)
    assert isinstance(round_, Round) and (round_.num_accepted, round_.text) == (3, " ") and round_.draft[-1] == 35
    assert isinstance(block, Block) and isinstance(end, Finished) and stream.text == "All "


async def test_score(asking: Asking, cells: ScriptedCells) -> None:
    score = await asking.score("Hi", [10, 11], request_id="s-1", priority=3)
    assert (score.prompt_tokens, score.token_ids, score.request_id) == (3, (10, 11), "s-1")
    assert score.log_probs == pytest.approx((-0.10, -0.11)) and score.is_greedy == (True, False)
    assert score.sum_log_prob == pytest.approx(-0.21) and cells.scored[0].priority == 3


async def test_several_continuations_of_one_prompt(asking: Asking, cells: ScriptedCells) -> None:
    texts = [" all", "!", " there"]
    scores = await asking.of("scores", "Hi", texts, request_id="s-1", priority=3)
    assert [score.token_ids for score in scores] == [tokens(text) for text in texts]
    assert [score.sum_log_prob for score in scores] == pytest.approx([-sum(tokens(text)) / 100 for text in texts])
    assert {(score.prompt_tokens, score.request_id) for score in scores} == {(3, "s-1")}
    assert len({scored.id for scored in cells.scored}) == 3 and {scored.priority for scored in cells.scored} == {3}
    assert await asking.of("scores", "Hi", [tokens(text) for text in texts], request_id="s-1") == scores
    assert await asking.of("scores", "Hi", ["!"], request_id="s-1") == (
        await asking.score("Hi", "!", request_id="s-1"),
    )


async def test_wrong_continuations(asking: Asking, cells: ScriptedCells) -> None:
    for wrong, told in (([], "got none"), ("Hi", "got a str"), (["a", [5]], "got texts and token ids")):
        with pytest.raises(InvalidRequest, match=f"continuations: {told}"):
            await asking.of("scores", "Hi", wrong)
    with pytest.raises(InvalidRequest, match=r"continuations\[1\]: got a list"):
        await asking.of("scores", "Hi", [[5], [-1]])
    with pytest.raises(InvalidRequest, match=r"continuation\w*\[\d\]: got an empty continuation"):
        await asking.of("scores", "Hi", ["a", ""])
    assert not cells.scored


async def test_tokens_of_text_and_back(asking: Asking) -> None:
    assert await asking.of("tokenize", "Hi") == (1, *tokens("Hi"))
    assert await asking.of("tokenize", "Hi", add_special_tokens=False) == tokens("Hi")
    assert await asking.of("detokenize", [1, *tokens("Hi")]) == "<s>Hi"
    for wrong in ("Hi", [-1]):
        with pytest.raises(InvalidRequest, match="token_ids"):
            await asking.of("detokenize", wrong)


async def test_model_and_health(asking: Asking, cells: ScriptedCells) -> None:
    model = await asking.model()
    assert (model.name, model.modes, model.max_sequence_length) == ("fake", MODES, 256)
    assert model.checkpoint_fingerprint == "0123456789abcdef"
    if asking.client.target.over_grpc:
        assert model.has_tokenizer and model.vocab_size == 260 and model.version and model.defaults is not None
        assert (model.defaults["mode"], model.defaults["max_new_tokens"]) == ("diffusion", 128)
    assert await asking.is_alive()
    if not asking.client.target.over_grpc:  # gRPC's health is kept by the router, once a second
        cells.serves = {Mode.AR}
        ready = await asking.ready()
        assert ready.ready and ready.modes == {mode: mode == "ar" for mode in MODES}
        cells.is_ready = False
        ready = await asking.ready()
        assert not ready.ready and ready.reason


async def test_a_stream_that_is_left_frees_its_sequence(asking: Asking, cells: ScriptedCells) -> None:
    cells.pace_s = 0.01
    events, stream = await asking.stream("Hi", most=2)
    assert len(events) == 2 and stream.finished is None and stream.text == TEXT[:8]
    async with asyncio.timeout(20):
        while cells.open:
            await asyncio.sleep(0.01)


async def test_text_that_ends_lines_elsewhere(asking: Asking, cells: ScriptedCells) -> None:
    text = "a\u2028b\x85c\x1ed\re\u2029"
    cells.answer = tokens(text)
    _, stream = await asking.stream("Hi")
    assert stream.text == text == (await asking.complete("Hi")).text


async def test_options_that_there_are_not(asking: Asking, cells: ScriptedCells) -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        await asking.complete("Hi", max_tokens=3)
    with pytest.raises(TypeError, match="seed"):
        await asking.score("Hi", "a", seed=3)
    for wrong in (b"Hi", [1, -1], [True], 5):
        with pytest.raises(InvalidRequest, match="prompt: got a"):
            await asking.complete(wrong)
    with pytest.raises(InvalidRequest):
        await asking.complete("Hi", mode="fast")
    with pytest.raises(InvalidRequest):
        await asking.complete("Hi", temperature="hot")
    with pytest.raises(InvalidRequest, match="trace"):
        await asking.complete("Hi", trace=True)
    for seconds in (0, -1, 2e6, float("nan")):
        with pytest.raises(ValueError, match="timeout_s"):
            await asking.complete("Hi", timeout_s=seconds)
    assert not cells.requests


async def test_tokens_of_the_prompt_that_were_read_before(asking: Asking, cells: ScriptedCells) -> None:
    cells.cached = 2
    whole = await asking.complete("Hi", n=2)
    _, stream = await asking.stream("Hi", n=2)
    assert whole.usage.cached_tokens == stream._gathering.answer().usage.cached_tokens == 2
    assert (await asking.of("score", "Hi", " there")).cached_tokens == 2
