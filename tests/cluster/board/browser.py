"""A real Chromium without a window, led over its DevTools protocol. Skips where there is none."""

import asyncio
import base64
import itertools
import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# It shall reach nothing but what it is sent to.
_QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --no-proxy-server --remote-debugging-port=0 "
    "--hide-scrollbars --disable-dev-shm-usage"
).split()
_STARTS_S = 30.0


def program() -> str:
    """Its path. Skips where it is missing; fails there when REQUIRE_ALL=1."""
    found = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if found is None:
        why = f"none of {', '.join(PROGRAMS)} is installed (Debian: chromium)"
        if os.environ.get("REQUIRE_ALL") == "1":
            pytest.fail(why)
        pytest.skip(why)
    return found


class Tab:
    """One page. `said`: what its console got, errors above all."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.said: list[str] = []
        self.reading = asyncio.create_task(self._read())

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        told = await asyncio.wait_for(answer, 60)
        assert "error" not in told, f"{method}: {told['error']}"
        result: dict[str, Any] = told["result"]
        return result

    async def go(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)

    async def value(self, expression: str) -> Any:
        told = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, expression: str, within_s: float = 45.0) -> Any:
        """Waits until it is true; its value."""
        try:
            async with asyncio.timeout(within_s):
                while not (value := await self.value(expression)):
                    await asyncio.sleep(0.05)
                return value
        except TimeoutError:
            raise AssertionError(f"never true: {expression}; the console has {self.said}") from None

    async def look(self, width: int, height: int, dark: bool = False) -> None:
        """A window of this size."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    async def shoot(self, file: Path, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        told = await self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(told["data"]))

    async def _read(self) -> None:
        async for message in self._socket:
            told = message.json()
            if told.get("id") in self._answers:
                self._answers.pop(told["id"]).set_result(told)
            elif told.get("method") == "Runtime.exceptionThrown":
                details = told["params"]["exceptionDetails"]
                self.said.append(details.get("exception", {}).get("description", details["text"]))
            elif told.get("method") == "Log.entryAdded":
                self.said.append(f"{told['params']['entry']['level']}: {told['params']['entry']['text']}")


@asynccontextmanager
async def tab(profile: Path) -> AsyncGenerator[Tab, None]:
    """`profile`: a directory of its own."""
    process = await asyncio.create_subprocess_exec(
        program(), *_QUIET, f"--user-data-dir={profile}", "about:blank",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(_STARTS_S):
            while not (noted := profile / "DevToolsActivePort").exists() or not noted.read_text().strip():
                await asyncio.sleep(0.05)
        port = noted.read_text().split()[0]
        async with aiohttp.ClientSession() as http:
            async with http.get(f"http://127.0.0.1:{port}/json/list") as response:
                pages = [one for one in await response.json() if one["type"] == "page"]
            async with http.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                opened = Tab(socket)
                try:
                    yield opened
                finally:
                    opened.reading.cancel()
    finally:
        process.kill()
        await process.wait()
