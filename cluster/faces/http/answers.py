"""Calls for answers over HTTP: whole ones, and streams of server-sent events. Translates, delegates, translates back.

`parse` reads a body, `bodies` writes an answer.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from cluster.faces.error_codes import describe
from cluster.faces.http.answer_bodies import AnswerBodies, encoded, error_body
from cluster.faces.http.answer_call import AnswerCall
from cluster.faces.http.calls import CALL, Begun, begun, check_model
from cluster.faces.http.request_body import BodyReader
from cluster.runs.answer import Chunk, Piece, Usage
from cluster.runs.choices import told_of
from cluster.runs.deadline import Deadline
from cluster.runs.echoing import Echoing
from cluster.runs.generation import Checked, Generation
from cluster.runs.run import Generating
from cluster.runs.streams import drained, until_disconnect

_TRACE_EVENT = b"twotower.trace"
_LAST_WORDS_S = 2.0  # seconds beyond its deadline, for a stream to report that it has passed

Item = TypeVar("Item")
Numbered = tuple[int, Piece]  # with its run's number
Write = Callable[[bytes], Awaitable[None]]
Parse = Callable[[Mapping[str, object], str], AnswerCall]


class AnswersFace:
    """Answers the calls of one endpoint."""

    def __init__(self, generation: Generation, reader: BodyReader, parse: Parse, bodies: type[AnswerBodies]) -> None:
        self._generation, self._reader, self._parse, self._bodies = generation, reader, parse, bodies

    async def answer(self, request: Request) -> Response:
        generation = self._generation
        began = await begun(request, generation, self._reader)
        call = self._parse(began.body, began.outer_id)
        request.scope[CALL] = call.name
        check_model(call.model, generation.model.name)
        headers = began.headers(call.shown_id)
        checked = await self._checked(call)
        with ExitStack() as held:
            with call.told_of():
                held.enter_context(generation.hold([one for one in checked for _ in range(call.tries)], began.caller))
            if call.echo:
                return await self._echoed(request, call, checked, began, headers)
            runs = await self._runs(call, checked, began)
            pieces, bodies = generation.many(runs), self._bodies_of(call, checked)
            if call.stream:
                first = await until_disconnect(request.receive, _next(pieces))
                write = partial(self._write, call, bodies, runs, first, pieces)
                return EventStream(write, pieces, headers, began.deadline, held.pop_all())
            await until_disconnect(request.receive, drained(pieces))
        told = await told_of(runs, call.choices, call.tries)
        return _json(await bodies.whole(told, [run.usage for run in runs]), headers)

    async def _echoed(
        self,
        request: Request,
        call: AnswerCall,
        asks: Sequence[Checked],
        began: Begun,
        headers: Mapping[str, str],
    ) -> Response:
        """The echoed prompts, and their answers."""
        runs = list[Echoing]()
        for place, checked in enumerate(asks):
            with call.told_of(place):
                run = self._generation.echo_run(checked, call.answers, began.deadline, began.caller, began.parent)
                runs.append(await run)
        await until_disconnect(request.receive, drained(self._generation.many(runs)))
        usages = [run.answer.usage for run in runs]
        return _json(await self._bodies_of(call, asks).whole(runs, usages), headers)

    async def _checked(self, call: AnswerCall) -> list[Checked]:
        checked = []
        for place, ask in enumerate(call.asks):
            with call.told_of(place):
                checked.append(self._generation.check(ask))
            await asyncio.sleep(0)  # many prompts, one after the other, would block the loop
        return checked

    async def _runs(self, call: AnswerCall, asks: Sequence[Checked], began: Begun) -> list[Generating]:
        """The runs of one prompt are adjacent."""
        runs = list[Generating]()
        for place, checked in enumerate(asks):
            with call.told_of(place):
                run = self._generation.runs(checked, call.tries, began.deadline, began.caller, began.parent)
                runs += await run
        return runs

    def _bodies_of(self, call: AnswerCall, asks: Sequence[Checked]) -> AnswerBodies:
        name = self._generation.model.name
        names = self._generation.token_numbers if call.numbered else self._generation.token_names
        return self._bodies(call, name, int(time.time()), asks[0].terms.params.mode, names)

    async def _write(
        self,
        call: AnswerCall,
        bodies: AnswerBodies,
        runs: list[Generating],
        first: Numbered,
        rest: AsyncGenerator[Numbered, None],
        send: Write,
    ) -> None:
        """Server-sent events, one or more per piece. An error is an event, too, and then there is no [DONE]."""
        usages = [Usage(len(run.request.prompt_token_ids)) for run in runs]
        numbered: Numbered | None = first
        told = usages if call.continuous_usage else None
        try:
            # In the order of their numbers, not of their arrival: clients list choices in the order of first events.
            for index, run in enumerate(runs):
                for event in bodies.opening(index, run, told):
                    await send(_event(event))
            while numbered is not None:
                index, piece = numbered
                if isinstance(piece, Chunk):
                    usages[index] = piece.usage
                    for event in bodies.chunk(index, runs[index], piece, told):
                        await send(_event(event))
                else:
                    await send(_event(bodies.trace(index, piece, self._generation.token_texts), _TRACE_EVENT))
                numbered = await anext(rest, None)
            if call.include_usage:
                await send(_event(bodies.usage(usages)))
            await send(b"data: [DONE]\n\n")
        except Exception as error:
            await send(_event(error_body(describe(error, call.name))))


class EventStream(Response):
    """A stream of server-sent events. When the client leaves, its source is closed at once, and then its room.

    A client that does not read is cut off when the deadline has passed.
    """

    def __init__(
        self,
        write: Callable[[Write], Awaitable[None]],
        source: AsyncGenerator[Any, None],
        headers: Mapping[str, str],
        deadline: Deadline,
        held: ExitStack,
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._write, self._source, self._held = write, source, held
        self._written_by = replace(deadline, ends_at=deadline.ends_at + _LAST_WORDS_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            async with aclosing(self._source), self._written_by.over():
                await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async def write(event: bytes) -> None:
            await send({"type": "http.response.body", "body": event, "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self._write(write)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _json(body: bytes, headers: Mapping[str, str]) -> Response:
    return Response(body, headers=headers, media_type="application/json")


async def _next(items: AsyncGenerator[Item, None]) -> Item:
    return await anext(items)


def _event(body: object, name: bytes = b"") -> bytes:
    """A named event, for clients that listen for it."""
    return (b"event: " + name + b"\n" if name else b"") + b"data: " + encoded(body) + b"\n\n"
