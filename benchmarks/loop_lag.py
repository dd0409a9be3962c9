"""How long one request holds up a router's event loop: the worst of each kind, against both faces in this process.

    python -m benchmarks.loop_lag [--repeats 5] [--only stop]

The cells are a script, the tokenizer is the demo's. A task that wakes every millisecond beside each request tells how
late it woke: the table has the 99th percentile and the worst, in milliseconds, over all repeats; the most that the
loop's thread worked between two beats, which other processes do not lengthen; how long one request took; its status.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.config import ServiceConfig
from cluster.generation import Generation
from cluster.grpc_boundary import guarded
from cluster.grpc_service import GenerationServicer
from cluster.http import make_app
from cluster.served_model import ServedModel, load_served_model
from twotower.core import AnyRequest, BlockEvent, FinishReason, Request
from twotower.pb.twotower.v1 import generation_pb2 as pb
from twotower.validation import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS

_MIB = 2**20
_EVENT = 16  # tokens
_BEAT_S = 0.001
Body = Callable[[ServedModel], bytes]


class OneToken:
    """An answer of the prompt's last token, again and again: cells, and a stay on one."""

    cell = "script"

    def __init__(self, fingerprint: str, request: AnyRequest | None = None) -> None:
        self.fingerprint, self._request, self._start = fingerprint, request, 0

    async def ready(self) -> bool:
        return True

    def elsewhere(self, avoid: Set[str]) -> bool:
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
        return BlockEvent(request.id, start, tokens, 1, len(tokens), reason)

    async def close(self) -> None:
        """Nothing runs."""


@dataclass(frozen=True, slots=True)
class Lag:
    """How late the beat was beside one kind of request, the most that the loop's own thread worked between two beats,
    how long one request took at most, and the statuses that were answered.
    """

    p99_s: float
    worst_s: float
    work_s: float
    request_s: float
    statuses: tuple[int, ...]


def _completion(**fields: object) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def _stop_strings(model: ServedModel) -> bytes:
    """Half of them the answer, of one letter, always matches but for the last of theirs, and half never."""
    assert model.tokenizer is not None
    letter = model.tokenizer.encode_continuation("a")
    stop = ["a" * (MAX_STOP_CHARACTERS - 1 - i) + "b" for i in range(MAX_STOP_STRINGS // 2)]
    stop += ["b" + "a" * (MAX_STOP_CHARACTERS - 1 - i) for i in range(MAX_STOP_STRINGS // 2)]
    return _completion(prompt=letter, max_tokens=4000, ignore_eos=True, stop=stop, diffusion={"mode": "ar"})


def _endless(token: Callable[[ServedModel], int]) -> Body:
    return lambda model: _completion(
        prompt=[token(model)], max_tokens=4000, ignore_eos=True, stop="never", diffusion={"mode": "ar"}
    )


def _broken_byte(model: ServedModel) -> int:
    assert model.tokenizer is not None
    decode = model.tokenizer.decode
    return next(t for t in range(4, model.limits.vocab_size) if decode([t]) == "\ufffd")


def _many_ids(model: ServedModel) -> bytes:
    return _completion(prompt=[[99] * 4000] * 256, max_tokens=1)


KINDS: Mapping[str, Body] = {
    "token ids of one prompt: 2 million": lambda model: b'{"prompt":[' + b"9," * (2 * _MIB - 40) + b"9]}",
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
    "256 whole answers of 1,000 tokens": lambda model: _completion(prompt=["a"] * 256, max_tokens=1000),
}


def _unknown_number(number: int) -> bytes:
    """A field of this number, of which no message knows, with the value 0."""
    tag, text = number << 3, bytearray()
    while tag > 127:
        text.append(tag & 127 | 128)
        tag >>= 7
    return bytes([*text, tag, 0])


GRPC_KINDS: Mapping[str, Body] = {
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
    """The status of one completion request, asked without a client library, whose own work would count."""
    parts: list[dict[str, object]] = [{"type": "http.request", "body": body}]
    gone: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
    statuses: list[int] = []

    async def receive() -> dict[str, object]:
        return parts.pop() if parts else await gone

    async def send(message: Mapping[str, Any]) -> None:
        if "status" in message:
            statuses.append(message["status"])

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions"}
    scope |= {"headers": [], "query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": ""}
    await app({**scope, "server": ("here", 80), "client": ("here", 1), "asgi": {"version": "3.0"}}, receive, send)
    return statuses[0]


class _Call:
    """As much of a gRPC context as an answer to one call needs."""

    def __init__(self) -> None:
        self.code = 0

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> None:
        return None

    async def abort_with_status(self, status: Any) -> None:
        self.code = status.code.value[0]


async def ask_grpc(servicer: GenerationServicer, message: bytes) -> int:
    """The code of one Generate call, from the bytes of its message on."""
    call = _Call()
    await guarded(servicer.Generate, pb.GenerateRequest)(message, call)
    return call.code


async def lag_of(ask: Ask, body: bytes, repeats: int) -> Lag:
    """How late a task beside `repeats` of these requests woke."""
    late, worked = list[float](), list[float]()

    async def beat() -> None:
        while True:
            before, work_before = time.perf_counter(), time.thread_time()
            await asyncio.sleep(_BEAT_S)
            late.append(time.perf_counter() - before - _BEAT_S)
            worked.append(time.thread_time() - work_before)

    beating = asyncio.create_task(beat())
    await asyncio.sleep(0.01)
    statuses, longest = set[int](), 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        statuses.add(await ask(body))
        longest = max(longest, time.perf_counter() - began)
        await asyncio.sleep(0.01)
    beating.cancel()
    return Lag(
        statistics.quantiles(late, n=100, method="inclusive")[98],
        max(late),
        max(worked),
        longest,
        tuple(sorted(statuses)),
    )


def open_faces() -> tuple[Ask, Ask, ServedModel]:
    """Ways to ask a router's HTTP and gRPC faces over scripted cells, with the demo's tokenizer."""
    model = load_served_model(ServiceConfig())
    generation = Generation(model, OneToken(model.fingerprint))
    app = make_app(generation, lambda: True, 4 * _MIB)
    return partial(ask, app), partial(ask_grpc, GenerationServicer(generation)), model


async def _table(repeats: int, only: str) -> None:
    http, grpc, model = open_faces()
    print(f"| request | p99 ms | worst ms | work ms | request s | status |\n|{'---|' * 6}")
    for name, body_of in {**KINDS, **GRPC_KINDS}.items():
        if only in name:
            lag = await lag_of(http if name in KINDS else grpc, body_of(model), repeats)
            milliseconds = f"{lag.p99_s * 1e3:.1f} | {lag.worst_s * 1e3:.1f} | {lag.work_s * 1e3:.1f}"
            print(
                f"| {name} | {milliseconds} | {lag.request_s:.2f} | {', '.join(map(str, lag.statuses))} |", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="how often each is asked (default: 5)")
    parser.add_argument("--only", default="", metavar="WORDS", help="only requests whose name holds these words")
    options = parser.parse_args()
    asyncio.run(_table(options.repeats, options.only))


if __name__ == "__main__":
    main()
