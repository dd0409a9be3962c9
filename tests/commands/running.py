"""The command `generate` run by a test: how it ended, files for it, and a pair that does as it is told."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.goldens import VENDORED
from twotower.commands import main
from twotower.core import BlockEvent, FinishReason, Request

IDS_ONLY = str(VENDORED / "tt_moe")
RESULT = [
    "token_ids",
    "text",
    "finish_reason",
    "num_steps",
    "num_blocks",
    "num_drafted",
    "num_accepted",
    "num_ar_blocks",
    "num_diffusion_blocks",
    "mode",
    "seconds",
    "seed",
]
GOOD = ["--checkpoint", IDS_ONLY, "--prompt-token-ids", "5,6"]


class Run:
    """How one command ended."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        try:
            self.code: Any = main(["generate", *arguments])
        except SystemExit as exit_:
            self.code = exit_.code
        self.out, self.err = capsys.readouterr()

    @property
    def result(self) -> dict[str, Any]:
        result: dict[str, Any] = strict_json(self.out)
        return result


def strict_json(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def json_lines(path: Path, *lines: str | bytes | dict[str, Any]) -> str:
    """A JSON lines file."""
    as_bytes = [line if isinstance(line, bytes) else _text(line).encode() for line in lines]
    path.write_bytes(b"\n".join(as_bytes) + b"\n")
    return str(path)


def _text(line: str | dict[str, Any]) -> str:
    return line if isinstance(line, str) else json.dumps(line)


def results_of(path: Path) -> list[dict[str, Any]]:
    return [strict_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


class FakePair:
    """Decodes as `behave` says: an error, or tokens."""

    def __init__(self, behave: Callable[[Request], object]) -> None:
        self._behave = behave

    async def events(self, request: Request) -> AsyncGenerator[BlockEvent, None]:
        what = self._behave(request)
        if asyncio.iscoroutine(what):
            what = await what
        if isinstance(what, BaseException):
            raise what
        yield BlockEvent(request.id, 0, (7,), 1, 1, FinishReason.STOP)


def fake_pair(monkeypatch: pytest.MonkeyPatch, behave: Callable[[Request], object]) -> list[Any]:
    """Put a fake pair in the place of the real one. Returns the settings it was opened with."""
    opened: list[Any] = []

    @asynccontextmanager
    async def open_pair(directory: Path, settings: Any, *_: object, **__: object) -> AsyncIterator[FakePair]:
        opened.append(settings)
        yield FakePair(behave)

    monkeypatch.setattr("twotower.commands.generate.open_pair", open_pair)
    return opened
