"""The page in a real browser: what it shows is what is told, by keyboard, on a phone, and without an error."""

import asyncio
import json
import math
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn

from cluster.board import feed as feeds
from cluster.board.face import add_ops
from cluster.board.feed import Feed
from cluster.board.trade import RECORD, Trade, add_trade
from cluster.faces.http.service import make_app
from cluster.runs.record import Record
from cluster.served_paths import checkpoint_directory
from tests.cluster.board.browser import Tab, program, tab
from tests.cluster.board.signed import Hearing, beat
from tests.cluster.fakes import FINGERPRINT, ScriptedCells, all_modes, generation, served_model, tokens
from twotower.core import DecodingParams, Mode, Request, RequestId

CTRL = 2  # as DevTools has it
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@asynccontextmanager
async def served(feed: Feed, checkpoint: Path) -> AsyncGenerator[str, None]:
    app = make_app(generation(ScriptedCells()), all_modes)
    add_ops(app, feed)
    add_trade(app, Trade(checkpoint, served_model()))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve([listening]))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        feed.stop()
        server.should_exit = True
        await serving


def service() -> Hearing:
    """With a minute behind it, and a request under way."""
    hearing = Hearing(heard=[beat("a"), beat("b")])
    record = Record(Request(RequestId("req-0123456789"), (5,), DecodingParams(max_new_tokens=64)), "f00d")
    hearing.board.observer.opened(record)
    record.attempts.append("a")
    hearing.board.observer.placed(record)
    hearing.tick(60)
    return hearing


async def text(page: Tab, selector: str) -> str:
    return str(await page.value(f"document.querySelector({selector!r}).innerText"))


async def the_trade(page: Tab, record: Path) -> None:
    """What another γ would cost: by keyboard, in words, against what is served now."""
    await page.until("document.querySelector('#trade pre') !== null")
    assert "the checkpoint brings no tuned.json" in await text(page, "#trade")
    assert "cluster tune --input prompts.jsonl --output CHECKPOINT/tuned" in await text(page, "#trade pre")
    shipped = json.loads((checkpoint_directory("demo") / RECORD).read_text(encoding="utf-8"))
    best = 1.1 * max(way["times_ar"] for way in shipped["ways"])
    verified = shipped["ways"][0] | {"times_ar": best, "tokens_per_step": 7.0, "same_as_ar": True, "recommended": True}
    told = shipped | {"checkpoint": FINGERPRINT, "verified": verified}
    record.write_text(json.dumps(told), encoding="utf-8")
    await page.value("document.querySelector('#trade .none button').click()")
    await page.until("document.querySelectorAll('#trade tbody tr').length === 9")
    assert "verified advised" in await text(page, "#trade tbody tr:last-child th")
    assert "γ 0.8 is what a request gets now" in await text(page, "#trade-said")
    await page.value("document.getElementById('trade-way').focus()")
    await page.call(
        "Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39
    )
    said = (await text(page, "#trade-said")).replace("\u00a0", " ")
    now, careful = (next(way for way in shipped["ways"] if way["threshold"] == each) for each in (0.8, 0.9))
    less = f"{100 * (1 - careful['times_ar'] / now['times_ar']):.0f} % less throughput"
    assert f"γ 0.9 instead of γ 0.8: {_points_more(careful, now)} of ar's quality" in said and less in said
    steps = " tokens per step instead of ".join(f"{way['tokens_per_step']:.2f}" for way in (careful, now))
    assert "decode.confidence_threshold=0.9" in said and steps in said
    await page.value("document.querySelector('#trade tbody tr:last-child').click()")
    said = (await text(page, "#trade-said")).replace("\u00a0", " ")
    assert f"verified instead of γ 0.8: {_points_more(verified, now)} of ar's quality" in said
    assert "decode.mode=verified" in said
    assert f"{100 * (best / now['times_ar'] - 1):.0f} % more throughput" in said
    assert "instead of γ 0.8" in await page.value("document.getElementById('trade-way').getAttribute('aria-valuetext')")
    await page.value("document.getElementById('trade-x-1').click()")
    assert "tokens per denoiser step" in await page.value("document.querySelector('#trade svg').textContent")


def _points_more(way: dict[str, float], now: dict[str, float]) -> str:
    more = way["quality"] - now["quality"]
    assert more > 0, "the shipped record loses quality with fewer tokens a step"
    return f"{100 * more:.1f} points more"


async def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program()
    monkeypatch.setattr(feeds, "PACE_S", 0.3)
    hearing = service()
    async with served(Feed(hearing.board), tmp_path) as url, tab(tmp_path / "profile") as page:
        await page.look(1280, 900)
        await page.go(f"{url}/ops")
        await page.until("document.querySelectorAll('.cell').length === 2")
        assert "All is well: 2 cells serve diffusion, mock_ar, ar" in await text(page, "#verdict")
        assert "busy 75" in await page.value(
            "document.querySelector('.tower.denoiser').title.replaceAll('\\u00a0', ' ')"
        )
        assert "0 of 4" in await text(page, "#requests tbody tr") and "01234567" in await text(
            page, "#requests tbody th"
        )
        assert await page.value("document.querySelectorAll('svg.plot path.line').length") == 13
        await page.value("document.getElementById('moment').focus()")
        for key in ("ArrowLeft", "ArrowLeft"):
            await page.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=37)
        assert await text(page, "#moment-text") != "now", "the keyboard leads through time"
        await the_trade(page, tmp_path / RECORD)
        await page.look(390, 800)
        assert await page.value("document.documentElement.scrollWidth") == 390, "nothing sticks out of a phone"
        hearing.heard = [beat("a", (Mode.AR,), 0.5), beat("b")]
        hearing.tick(13)
        await page.until("document.querySelector('#alerts li.act') !== null")
        alert = (await text(page, "#alerts li")).replace("\u00a0", " ")
        assert "no denoiser in cell a" in alert and "since 12 s" in alert
        assert "no denoiser in cell a" in await page.value("document.title")
        await _see_the_playground(page)
        await _see_the_docs(page)


async def _see_the_docs(page: Tab) -> None:
    """The other page of the service: made by its script of what the service says of itself."""
    before = len(page.said)
    await page.value("location.href = '/docs'")
    await page.until("location.pathname === '/docs' && document.getElementById('ChatRequest') !== null")
    assert "/v1/chat/completions" in await text(page, "#main")
    row = "[...document.querySelectorAll('#CompletionRequest tr')].find((one) => one.innerText.startsWith('n\\t'))"
    assert await page.value(f"{row}.innerText") == "n\tinteger from 1 to 256 · else 1\tanswers to each prompt"
    assert await page.value("document.documentElement.scrollWidth") == 390, "nothing sticks out of a phone"
    assert page.said[before:] == []


async def _see_the_playground(page: Tab) -> None:
    """Answers of scripted cells, whose steps, drafts and verdicts are known."""

    async def ask(mode: str) -> None:
        await page.value(f"document.getElementById('mode-{mode}').click()")
        await page.value("document.getElementById('prompt').focus()")
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        await page.call("Input.dispatchKeyEvent", type="rawKeyDown", modifiers=CTRL, **enter)
        await page.until("document.getElementById('stop').disabled")

    def chips(lane: str, kind: str = "") -> str:
        return f"[...document.querySelectorAll('.lane.{lane} .chip{kind}')].map((chip) => chip.textContent)"

    await page.value("location.hash = '#playground'")
    await page.until("document.getElementById('service-view').hidden")
    await page.value("document.getElementById('prompt').value = 'It\\'s'; document.getElementById('most').value = 6")
    await ask("diffusion")
    assert await page.value(chips("diffusion")) == list("All go")
    assert "6 tokens" in await text(page, ".facts") and "4 steps" in await text(page, ".facts")
    assert await page.value("document.querySelector('.chip').title.includes('confidence 0.500, step 0')")
    # Scripted cells: exp(-token / 100), and even tokens are what ar would choose.
    chosen = sum(token % 2 == 0 for token in tokens("All go"))
    assert f"{chosen} of 6 are what ar would choose" in await text(page, ".facts")
    assert len(await page.value(chips("diffusion", ".unchosen"))) == 6 - chosen > 0
    probability = f"probability under ar {math.exp(-tokens('A')[0] / 100):.3f}"
    assert probability in await page.value("document.querySelector('.chip').title")
    await page.value("document.getElementById('frame').focus()")
    await page.call("Input.dispatchKeyEvent", type="keyDown", key="Home", code="Home", windowsVirtualKeyCode=36)
    await page.call(
        "Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39
    )
    assert await page.value(chips("diffusion")) == ["A", "·", "l", "·"], "the first step of the first block"
    assert 'step 0 of the block at 0 fixes 2 positions: "A" "l"' in await page.value(
        "document.getElementById('frame').getAttribute('aria-valuetext')"
    )
    await ask("verified")
    assert await page.value(chips("verified", ".rejected")) == ["\x1f", "\x1f"]
    assert "4 of 6 drafted tokens stand" in (await text(page, ".facts"))
    await page.call(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}]
    )  # else it is played at once
    await ask("race")
    assert await page.value("[...document.querySelectorAll('.lane h3')].map((one) => one.textContent)") == [
        "ar", "diffusion", "verified",
    ]  # fmt: skip
    assert "".join(await page.value(chips("ar"))) == "All go"
    assert (await text(page, "#play-status")).count("tokens/s") == 3
    assert await page.value("document.documentElement.scrollWidth") == 390, "nothing sticks out of a phone"
    assert '"diffusion":{"mode":"ar"}' in await text(page, "#call") and "It'\\''s" in await text(page, "#call")
    assert page.said == []
    await page.value("document.getElementById('most').value = 9999")
    await page.value("document.getElementById('most').max = ''")
    await page.value("document.querySelector('#ask button.main').click()")
    await page.until("document.getElementById('play-status').classList.contains('bad')")
    assert "max_tokens: got 9999" in await text(page, "#play-status")
    assert ["400" in said for said in page.said] == [True]
