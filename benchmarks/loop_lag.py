"""How long one request holds up a router's event loop: the worst of each kind, against both faces in this process.

    python -m benchmarks.loop_lag [--repeats 5] [--only stop] --output benchmarks/results/loop_lag_<hardware>_<date>.md

The cells are a script, the tokenizer is the demo's. A task beside each request wakes every millisecond (a beat).
"""

import argparse
import asyncio
import gc
import json
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc

from benchmarks.reference.report import setup, table
from cluster.config import ServiceConfig
from cluster.faces.grpc.boundary import guarded
from cluster.faces.grpc.service import GenerationServicer
from cluster.faces.http.service import make_app
from cluster.runs.generation import Generation
from cluster.runs.served_model import ServedModel, load_served_model
from twotower.core import (
    MAX_ALTERNATIVES,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    AnyRequest,
    BlockEvent,
    FinishReason,
    Likelihood,
    Mode,
    Request,
)
from twotower.pb.twotower.v1 import generation_pb2 as pb

_MIB = 2**20
_EVENT = 16  # tokens
_BEAT_S = 0.001
_WHAT = """\
- late: how late a beat was, 99th percentile and worst. Other programs on the machine lengthen it.
- lag: the processor time of this whole process between two beats: for how long the loop's thread worked, or another
  thread of ours kept the interpreter's lock from it. Other programs hardly lengthen it. A test holds it.
- work: the part of it that the loop's own thread worked.
- request: from the first byte to the last one of the answer, in s.
- Each is the median over the repeats of the worst in each. Status 200 and 0: answered; 400 and 3: refused.
"""
# By the number of alternatives: texts of one to nine bytes.
_LIKELY = [Likelihood(-1.0, tuple(range(400, 400 + n)), (-2.0,) * n) for n in range(MAX_ALTERNATIVES + 1)]
Body = Callable[[ServedModel], bytes]


class OneToken:
    """An answer of the prompt's last token, again and again: cells, and a stay on one."""

    cell, vocabulary = "script", ""

    def __init__(self, fingerprint: str, request: AnyRequest | None = None) -> None:
        self.fingerprint, self._request, self._start = fingerprint, request, 0

    def lacks(self, request: AnyRequest) -> bool:
        return False

    async def served(self) -> Set[Mode]:
        return frozenset(Mode)

    def is_to_leave(self, cell: str, request: AnyRequest, fingerprint: str) -> bool:
        return False

    def elsewhere(self, request: AnyRequest, avoid: Set[str]) -> bool:
        return False

    async def place(self, request: AnyRequest, timeout_s: float, avoid: Set[str]) -> "OneToken":
        return OneToken(self.fingerprint, request)

    async def next(self) -> BlockEvent:
        await asyncio.sleep(0)
        request, start = self._request, self._start
        assert isinstance(request, Request)
        left = request.params.max_new_tokens - start
        tokens = request.prompt_token_ids[-1:] * min(_EVENT, left)
        self._start += len(tokens)
        reason = FinishReason.LENGTH if len(tokens) == left else None
        likelihoods = () if request.logprobs is None else (_LIKELY[request.logprobs],) * len(tokens)
        return BlockEvent(request.id, start, tokens, 1, len(tokens), reason, likelihoods=likelihoods)

    async def close(self) -> None:
        """Nothing runs."""


@dataclass(frozen=True, slots=True)
class Lag:
    """The findings of a beat beside one request: its delay, and the processor time between two beats. `lag_s` is this
    process's time, `work_s` the loop's own thread's. Also how long the request took, and its status.
    """

    p99_s: float
    worst_s: float
    lag_s: float
    work_s: float
    request_s: float
    status: int


def _completion(**fields: object) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def _stop_strings(model: ServedModel) -> bytes:
    """Half of them the answer, of one letter, always matches but for the last of theirs, and half never."""
    assert model.tokenizer is not None
    letter = model.tokenizer.encode_continuation("a")
    stop = ["a" * (MAX_STOP_CHARACTERS - 1 - i) + "b" for i in range(MAX_STOP_STRINGS // 2)]
    stop += ["b" + "a" * (MAX_STOP_CHARACTERS - 1 - i) for i in range(MAX_STOP_STRINGS // 2)]
    return _completion(prompt=letter, max_tokens=4000, ignore_eos=True, stop=stop, diffusion={"mode": "ar"})


def _chat(count: int, **fields: object) -> Body:
    """Of so many messages."""
    return lambda model: _completion(messages=[{"role": "user", "content": "words: 65"}] * count, **fields)


def _endless(token: Callable[[ServedModel], int]) -> Body:
    return lambda model: _completion(
        prompt=[token(model)], max_tokens=4000, ignore_eos=True, stop="never", diffusion={"mode": "ar"}
    )


def _broken_byte(model: ServedModel) -> int:
    assert model.tokenizer is not None
    decode = model.tokenizer.decode
    return next(t for t in range(4, model.limits.vocab_size) if decode([t]) == "\ufffd")


def _many_ids(model: ServedModel) -> bytes:
    return _completion(prompt=[[500] * 4000] * 256, max_tokens=1)


def _values(value: str) -> Body:
    """As many of these in an array as a body has room for."""
    return lambda model: b'{"prompt":[' + f"{value},".encode() * ((4 * _MIB - 40) // (len(value) + 1)) + b"9]}"


KINDS: Mapping[str, Body] = {
    "token ids of one prompt: 2 million": _values("9"),
    "fractions for a prompt: 1 million": _values("1e9"),
    "empty arrays for prompts: 1.4 million": _values("[]"),
    "empty strings for prompts: 1.4 million": _values('""'),
    "token ids of 256 prompts: 4,000 each": _many_ids,
    "text of 256 prompts: 2,000 bytes each": lambda model: _completion(prompt=["words: 65 " * 200] * 256, max_tokens=1),
    "text that just fits": lambda model: _completion(prompt="words" * 4000, max_tokens=1),
    "text: 4 MB": lambda model: _completion(prompt="words: 65 " * 400_000, max_tokens=1),
    "stop strings: as many and as long as allowed": _stop_strings,
    "an answer that is no text: 4,000 EOS": _endless(lambda model: 2),
    "an answer that is no text: 4,000 broken bytes": _endless(_broken_byte),
    "stop token ids: 2 million": lambda model: b'{"prompt":"a","stop_token_ids":[' + b"9," * (2 * _MIB - 40) + b"9]}",
    "unknown fields: 300,000": lambda model: _completion(prompt="a", **{f"f{i}": 1 for i in range(300_000)}),
    "a nonsensical value: 2 million entries": lambda model: (
        b'{"prompt":"a","seed":[' + b"9," * (2 * _MIB - 40) + b"9]}"
    ),
    "chat: 1,024 messages": _chat(1024, max_tokens=1),
    "chat: a message of 4 MB": lambda model: _completion(
        messages=[{"role": "user", "content": "words: 65 " * 400_000}]
    ),
    "chat: an answer of 2,000 tokens, each with 20 alternatives": _chat(
        1, max_tokens=2000, logprobs=True, top_logprobs=20, ignore_eos=True
    ),
    "best of 16 answers of 1,000 tokens": lambda model: _completion(
        prompt="a", max_tokens=1000, best_of=16, ignore_eos=True
    ),
    "256 whole answers of 1,000 tokens": lambda model: _completion(prompt=["a"] * 256, max_tokens=1000),
}


def _unknown_number(number: int) -> bytes:
    """A field of this number, of which no message knows, with the value 0."""
    tag, text = number << 3, bytearray()
    while tag > 127:
        text.append(tag & 127 | 128)
        tag >>= 7
    return bytes([*text, tag, 0])


def _message(**fields: Any) -> bytes:
    params = pb.DecodingParams(mode="MODE_AR", max_new_tokens=fields.pop("tokens", 1), ignore_eos=True)
    return pb.GenerateRequest(params=params, **fields).SerializeToString()


def _grpc_stop_strings(model: ServedModel) -> bytes:
    asked = json.loads(_stop_strings(model))
    return _message(token_ids=pb.TokenIds(ids=asked["prompt"]), stop=asked["stop"], tokens=4000)


GRPC_KINDS: Mapping[str, Body] = {
    "gRPC, token ids that just fit": lambda model: _message(token_ids=pb.TokenIds(ids=[500] * 4095)),
    "gRPC, text that just fits": lambda model: _message(text="words" * 4000),
    "gRPC, stop strings: as many and as long as allowed": _grpc_stop_strings,
    "gRPC, an answer that is no text: 4,000 EOS": lambda model: _message(
        token_ids=pb.TokenIds(ids=[2]), stop=["never"], tokens=4000
    ),
    "gRPC, one unknown field: 2 million times": lambda model: b"\x78\x00" * (2 * _MIB),
    "gRPC, unknown fields: 800,000": lambda model: b"".join(map(_unknown_number, range(100, 800_100))),
    "gRPC, stop strings: 1.4 million": lambda model: b"\x2a\x01a" * 1_398_000,
    "gRPC, stop strings that are not UTF-8: 1.4 million": lambda model: b"\x2a\x01\xff" * 1_398_000,
    "gRPC, token ids of one prompt: 4 million": lambda model: pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[9] * (4 * _MIB - 40))
    ).SerializeToString(),
    "gRPC, text: 4 MB": lambda model: pb.GenerateRequest(text="words: 65 " * 400_000).SerializeToString(),
}
Ask = Callable[[bytes], Awaitable[int]]


async def ask(app: Any, body: bytes) -> int:
    """The status of one completion, or of a chat, asked without a client library, whose own work would count."""
    parts: list[dict[str, object]] = [{"type": "http.request", "body": body}]
    gone: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
    statuses: list[int] = []

    async def receive() -> dict[str, object]:
        return parts.pop() if parts else await gone

    async def send(message: Mapping[str, Any]) -> None:
        if "status" in message:
            statuses.append(message["status"])

    path = "/v1/chat/completions" if body.startswith(b'{"messages"') else "/v1/completions"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
    scope |= {"headers": [], "query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": ""}
    await app({**scope, "server": ("here", 80), "client": ("here", 1), "asgi": {"version": "3.0"}}, receive, send)
    return statuses[0]


class _Call:
    """As much of a gRPC context as an answer to one call needs."""

    def __init__(self) -> None:
        self.code = 0
        self._trailing: Any = ()

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def peer(self) -> str:
        return "unix:"

    def time_remaining(self) -> None:
        return None

    def set_trailing_metadata(self, metadata: Any) -> None:
        self._trailing = metadata

    def trailing_metadata(self) -> Any:
        return self._trailing

    async def abort(self, code: grpc.StatusCode, details: str, metadata: Any) -> None:
        self.code = code.value[0]


async def ask_grpc(servicer: GenerationServicer, most_tokens: int, message: bytes) -> int:
    """The code of one Generate call, from the bytes of its message on."""
    call = _Call()
    await guarded(servicer.Generate, pb.GenerateRequest, most_tokens)(message, call)
    return call.code


async def lag_of(ask: Ask, body: bytes) -> Lag:
    """What a task that wakes every millisecond beside this request saw."""
    late, used, worked = list[float](), list[float](), list[float]()

    async def beat() -> None:
        while True:
            before, used_before, work_before = time.perf_counter(), time.process_time(), time.thread_time()
            await asyncio.sleep(_BEAT_S)
            late.append(time.perf_counter() - before - _BEAT_S)
            used.append(time.process_time() - used_before)
            worked.append(time.thread_time() - work_before)

    beating = asyncio.create_task(beat())
    await asyncio.sleep(0.01)
    began = time.perf_counter()
    status = await ask(body)
    took_s = time.perf_counter() - began
    await asyncio.sleep(0.01)
    beating.cancel()
    p99_s = statistics.quantiles(late, n=100, method="inclusive")[98]
    return Lag(p99_s, max(late), max(used), max(worked), took_s, status)


def open_faces() -> tuple[Ask, Ask, ServedModel]:
    """Ways to ask a router's HTTP and gRPC faces over scripted cells, with the demo's tokenizer."""
    model = load_served_model(ServiceConfig())
    generation = Generation(model, OneToken(model.fingerprint))
    app = make_app(generation, lambda: frozenset(Mode), 4 * _MIB)
    gc.freeze()  # as a router does
    return partial(ask, app), partial(ask_grpc, GenerationServicer(generation), model.limits.max_sequence_length), model


def _row(name: str, lags: Sequence[Lag]) -> list[str]:
    def median(of: Callable[[Lag], float], digits: int = 1, unit: float = 1e3) -> str:
        return f"{statistics.median(map(of, lags)) * unit:.{digits}f}"

    late = f"{median(lambda lag: lag.p99_s)}, {median(lambda lag: lag.worst_s)}"
    statuses = ", ".join(map(str, sorted({lag.status for lag in lags})))
    return [
        name,
        median(lambda lag: lag.lag_s),
        median(lambda lag: lag.work_s),
        late,
        median(lambda lag: lag.request_s, 2, 1),
        statuses,
    ]


async def _rows(repeats: int, only: str) -> list[list[str]]:
    http, grpc, model = open_faces()
    rows = []
    for name, body_of in {**KINDS, **GRPC_KINDS}.items():
        if only in name:
            body, ask_face = body_of(model), http if name in KINDS else grpc
            rows.append(_row(name, [await lag_of(ask_face, body) for _ in range(repeats)]))
            print(" | ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="how often each is asked (default: 5)")
    parser.add_argument("--only", default="", metavar="WORDS", help="only requests whose name holds these words")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the result goes")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    rows = asyncio.run(_rows(options.repeats, options.only))
    if options.output is not None:
        command = f"python -m benchmarks.loop_lag --repeats {options.repeats} --output {options.output}"
        packages = ", ".join(f"{name} {version(name)}" for name in ("fastapi", "protobuf", "tokenizers"))
        where = f"{setup(load_before, command)}\n- also: {packages}"
        heads = ["request", "lag ms", "work ms", "late ms: p99, worst", "request s", "status"]
        text = f"# How long one request holds up a router's loop\n\n{where}\n\n{_WHAT}\n{table(heads, rows)}\n"
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
