"""Clients in a namespace of their own: a process that asks the given hosts and reports the result of each request.

`python -m benchmarks.pods_parts.load CLIENTS [CHECKPOINT]` reads JSON lines from its standard input. Each line says
which hosts may get requests, and which names their certificates have. It says how many requests run at once at most,
and how long a client rests after each. It also says whether requests are long streams, whether failed ones are
repeated, and whether clients connect anew. The clients' credentials and trusted certificates are in the environment
(`ACCESS`).

It writes a JSON line whenever a request is sent, has its first tokens, fails and is repeated, or ends. Times are this
machine's monotonic clock. Each request goes to the next of these hosts, as a Kubernetes Service chooses among the pods
that are ready. Answers are compared with the library's, which this process computed before. If another checkpoint is
given, its answers count too.
"""

import asyncio
import itertools
import json
import os
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.chaos_parts.access import Access
from benchmarks.chaos_parts.client import (
    KINDS,
    Asked,
    Client,
    Load,
    Question,
    also_answered,
    client_of,
    questions,
)
from benchmarks.pods_parts.faces import ACCESS, GRPC_PORT, HTTP_PORT
from twotower.core import Mode

QUESTIONS, _TOKENS = 16, 48
# Streams to their last token. Those of diffusion take the library too long.
_LONG = tuple(kind for kind in KINDS if kind[1] in (Mode.AR, Mode.MOCK_AR) and kind[2:] == (True, False))
_LONG_TOKENS = 128
_AGAIN_S, _AGAIN_PAUSE_S = 90.0, 0.2


class Chooser:
    """Sends each request to one of the hosts that may get one now. While requests shall be `long`, it asks these."""

    def __init__(self, stack: AsyncExitStack, long: list[Question], access: Access) -> None:
        self._stack, self._long_ones, self._access = stack, itertools.cycle(long), access
        self._clients: dict[str, Client] = {}
        self._hosts: list[str] = []
        self._last_hosts: list[str] = []  # for what is asked again, though nothing new is asked
        self._most = self._under_way = 0
        self._pause_s, self._long, self._again = 0.0, False, False
        self._turn = itertools.count()
        self._changed = asyncio.Condition()

    async def take(self, hosts: dict[str, str], most: int, pause_s: float, long: bool, again: bool, anew: bool) -> None:
        """`hosts`: names by address. What is under way ends on the connections that it has."""
        for host, name in hosts.items():
            if anew or host not in self._clients:
                reached = client_of(f"{host}:{HTTP_PORT}", f"{host}:{GRPC_PORT}", self._access.to(name))
                self._clients[host] = await self._stack.enter_async_context(reached)
        async with self._changed:
            self._hosts, self._most, self._pause_s = list(hosts), most, pause_s
            self._last_hosts = self._hosts or self._last_hosts
            self._long, self._again = long, again
            self._changed.notify_all()

    async def ask(self, asked: Asked) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._hosts and self._under_way < self._most)
            self._under_way += 1
        if self._long:
            asked.question = next(self._long_ones)
        asked.sent = time.monotonic()
        host = self._next_host()
        question = asked.question
        _say(label=asked.label, host=host, what=_named(question), sent=asked.sent, differs=_differs(question))
        await self._clients[host].ask(asked, heard=_say_first)
        while asked.outcome.startswith("failed") and self._again and time.monotonic() < asked.sent + _AGAIN_S:
            await asyncio.sleep(_AGAIN_PAUSE_S)
            host = self._next_host()
            _say(label=asked.label, host=host, error=asked.outcome, at=asked.errors[-1][0])
            await self._clients[host].ask(asked, heard=_say_first)
        _say(label=asked.label, outcome=asked.outcome, events=asked.events, ended=asked.ended)
        await asyncio.sleep(self._pause_s)
        async with self._changed:
            self._under_way -= 1
            self._changed.notify_all()

    def _next_host(self) -> str:
        return self._last_hosts[next(self._turn) % len(self._last_hosts)]


def _named(question: Question) -> str:
    length = "long " if question.params.max_new_tokens == _LONG_TOKENS else ""
    return f"{question.face} {length}{question.mode or 'score'}{' stream' if question.is_stream else ''}"


def _say_first(asked: Asked) -> None:
    if len(asked.events) == 1:
        _say(label=asked.label, streams=True)


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


async def _hear(chooser: Chooser) -> None:
    """Until nobody speaks any more."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        await chooser.take(**json.loads(line))


async def main(clients: int, other: Path | None = None) -> None:
    asked = await questions(QUESTIONS, _TOKENS)
    long = await questions(len(_LONG), _LONG_TOKENS, kinds=_LONG)
    if other is not None:
        asked, long = await also_answered(asked, other), await also_answered(long, other)
    _say(questions=len(asked) + len(long), differ=sum(map(_differs, [*asked, *long])))
    async with AsyncExitStack() as stack:
        chooser = Chooser(stack, long, Access.read(os.environ[ACCESS]))
        load = Load(chooser.ask, asked, "pods")
        load.start(clients)
        await _hear(chooser)
        await load.stop(0)  # nobody asks any more


def _differs(question: Question) -> bool:
    """Whether the other weights answer it otherwise."""
    right, other = question.right, question.other
    return other is not None and (other.tokens, other.log_probs) != (right.tokens, right.log_probs)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), *map(Path, sys.argv[2:])))
