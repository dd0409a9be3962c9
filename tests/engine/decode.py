"""Run requests to their end through a pair and collect what came out."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from twotower.core import BlockEvent, DecodingParams, FinishReason, Mode, Request, RequestId
from twotower.engine.in_process import pair_of
from twotower.engine.modes.block_steps import StepTrace
from twotower.engine.pair import Pair
from twotower.engine.settings import EngineSettings
from twotower.model.tower import ContextTower, DenoiserTower

SETTINGS = EngineSettings(max_sequences=32, max_sequence_length=256, prefill_chunk_tokens=64, max_queued_requests=512)


@dataclass
class Decoded:
    token_ids: list[int] = field(default_factory=list)
    num_steps: int = 0
    num_blocks: int = 0
    finish_reason: FinishReason | None = None
    starts: list[int] = field(default_factory=list)
    margin: float | None = None
    cached_tokens: int = 0

    def add(self, event: BlockEvent) -> None:
        assert event.start == len(self.token_ids)
        self.starts.append(event.start)
        self.token_ids += event.token_ids
        self.num_steps += event.num_steps
        self.num_blocks += event.num_blocks
        self.cached_tokens += event.cached_tokens
        self.finish_reason, self.margin = event.finish_reason, event.margin


async def collect(pair: Pair, request: Request) -> Decoded:
    out = Decoded(list(request.committed))
    async for event in pair.generate(request, timeout_s=60):
        out.add(event)
    return out


def decode_all(
    context: ContextTower,
    denoiser: DenoiserTower | None,
    requests: Sequence[Request],
    together: bool = True,
    traces: list[StepTrace] | None = None,
    settings: EngineSettings = SETTINGS,
) -> list[Decoded]:
    """All requests through one in-process pair, at once or one after the other."""

    async def run() -> list[Decoded]:
        async with pair_of(context, denoiser, settings, traces.append if traces is not None else None) as pair:
            if together:
                return list(await asyncio.gather(*(collect(pair, request) for request in requests)))
            return [await collect(pair, request) for request in requests]

    return asyncio.run(run())


def plain_request(name: object, mode: Mode = Mode.AR, new: int = 16, prompt: Sequence[int] = (5, 6, 7)) -> Request:
    return Request(RequestId(str(name)), tuple(prompt), DecodingParams(mode=mode, max_new_tokens=new, ignore_eos=True))
