"""Clients that others wrote, as they are, against a service with the demo: they come in .venv-clients."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients import lm_eval_tasks
from tests.cluster.service import Service, running_service
from twotower.demo.__main__ import CHECKPOINT
from twotower.demo.corpus import held_out

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ROOT / ".venv-clients"
PROGRAMS = Path(__file__).parent / "programs"
PROTO = ROOT / "protos" / "twotower" / "v1" / "generation.proto"
WORDS = "two thousand and nine"
MULTIPLE_CHOICE, GENERATION = 24, 12


def required(path: Path, made_by: str) -> None:
    """Skips where it is absent; fails there when REQUIRE_ALL=1."""
    if not path.exists():
        if os.environ.get("REQUIRE_ALL") == "1":
            pytest.fail(f"{path.name} is missing: {made_by}")
        pytest.skip(f"needs {made_by}")


@pytest.fixture(scope="module")
def service(ray_cluster: None) -> Iterator[Service]:
    required(CLIENTS / "bin" / "python", "make clients-env")
    with running_service(
        model={"checkpoint": str(CHECKPOINT), "name": "demo"}, cell={"placement": "colocated"}, decode={"mode": "ar"}
    ) as running:
        yield running


def printed(*command: str | Path) -> Any:
    """What a client's program printed as its last line."""
    environment = {**os.environ, "CLIENTS": str(CLIENTS), "HF_HUB_OFFLINE": "1", "LANGSMITH_TRACING": "false"}
    environment |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def of_python(program: str, service: Service) -> Any:
    return printed(CLIENTS / "bin" / "python", PROGRAMS / program, f"http://{service.http}")


def of_node(program: str, *arguments: str | Path) -> Any:
    required(CLIENTS / "node_modules", "make clients-env, with npm")
    return printed("node", PROGRAMS / program, *arguments)


def test_litellm(service: Service) -> None:
    got = of_python("with_litellm.py", service)
    assert {got.pop(name) for name in ("whole", "streamed", "chat", "chat streamed", "chat async")} == {WORDS}
    assert "got -1" in got.pop("refused") and got == {"tokens": 8}


def test_langchain(service: Service) -> None:
    got = of_python("with_langchain.py", service)
    assert {got.pop(name) for name in ("whole", "streamed", "chat", "chat streamed", "chat async")} == {WORDS}
    assert got == {"batch": [WORDS, "MMMCCCLXXVI"], "usage": 8}


@pytest.fixture(scope="module")
def openai_for_python(service: Service) -> Any:
    """What its program got: one start of it for all tests."""
    return of_python("with_openai.py", service)


def test_openai_for_python(openai_for_python: Any) -> None:
    got = openai_for_python["completions"]
    assert {got["whole"], got["streamed"]} == {WORDS} and got["echoed"] == f"words: 2009\n{WORDS}"
    assert got["used"] == [8] and got["several"] == [0, 1, 2]
    names, log_probs, tops = got["rated"]
    assert "".join(names[:-1]) == WORDS and len(names) == len(log_probs) == len(tops) == 8
    assert all(-1 < log_prob <= 0 for log_prob in log_probs) and set(tops) == {2}
    text, scores = got["scored"]
    assert text == "words: 2009\n" and scores[0] is None and all(score <= 0 for score in scores[1:])
    got = openai_for_python["chats"]
    assert got["whole"] == [WORDS] * 2 and got["rated"] == [8, 8] and got["streamed"] == WORDS
    got = openai_for_python["asynchronous"]
    assert got.pop("models") == ["demo"] and set(got.values()) == {WORDS}
    assert openai_for_python["models"] == ["demo", "demo"]


def test_openai_for_python_raises_its_own_exceptions(openai_for_python: Any) -> None:
    """Those for keys and their limits: tests/cluster/test_keys.py."""
    assert openai_for_python["exceptions"] == {
        "wrong": ["BadRequestError", 400, "temperature", None],
        "unknown": ["BadRequestError", 400, "nobody_s", None],
        "model": ["NotFoundError", 404, "model", "model_not_found"],
        "retrieved": ["NotFoundError", 404, "model", "model_not_found"],
        "streamed": ["BadRequestError", 400, "temperature", None],
        "deadline": ["InternalServerError", 504, None, None],
        "timeout": ["APITimeoutError"],
    }


def test_openai_for_python_reads_answers_into_models(openai_for_python: Any) -> None:
    got = openai_for_python
    parsed = got["parsed"]
    assert parsed["ar"] == parsed["verified"] == got["streamed"]["joined"] == got["streamed"]["whole"]
    for answer in parsed.values():
        assert answer["tens"] in ("twenty", "thirty") and isinstance(answer["is_even"], bool)
    assert got["plain"] and got["refused"] == "frequency_penalty"


def test_openai_for_node(service: Service) -> None:
    got = of_node("with_openai.mjs", f"http://{service.http}")
    assert {got.pop(name) for name in ("whole", "streamed", "chat", "chat streamed")} == {WORDS}
    assert got == {"tokens": 8, "models": ["demo"], "refused": ["BadRequestError", 400, "temperature"]}


def test_a_client_for_node_made_from_the_proto(service: Service) -> None:
    got = of_node("with_grpc.mjs", service.grpc, PROTO)
    assert (got["whole"], got["streamed"], got["finished"]) == (WORDS, WORDS, "FINISH_REASON_STOP")
    assert -1 < got["scored"] < 0 and "MODE_DIFFUSION" in got["modes"]
    assert got["refused"][0] == 3 and "got -1" in got["refused"][1]


def test_lm_eval(service: Service, tmp_path: Path) -> None:
    """A generation and a multiple-choice task of held-out prompts. Its log-likelihoods are our scorer's."""
    lm_eval_tasks.write(tmp_path, held_out("words", MULTIPLE_CHOICE), held_out("roman", GENERATION))
    done = subprocess.run(
        [CLIENTS / "bin" / "lm_eval", *lm_eval_tasks.arguments(tmp_path, f"http://{service.http}", CHECKPOINT)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
    )
    assert done.returncode == 0, done.stderr
    results = lm_eval_tasks.results(tmp_path)
    assert results["demo_choice"]["acc,none"] == 1.0
    assert results["demo_generation"]["exact_match,none"] >= 0.9
    for token_ids, start, log_prob, is_greedy in lm_eval_tasks.likelihoods(tmp_path, CHECKPOINT):
        body = {"prompt": token_ids[:start], "continuation": token_ids[start:]}
        scored = httpx.post(f"http://{service.http}/v1/score", json=body).json()
        assert scored["sum_log_prob"] == pytest.approx(log_prob, abs=1e-3)
        assert all(scored["is_greedy"]) == is_greedy
