"""The ops page as one document: the files of `static/` put together, and a policy that allows these alone."""

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FILES = Path(__file__).parent / "static"
STYLES = ("ops.css", "playground.css", "trade.css")
SCRIPTS = (
    "words.js",
    "elements.js",
    "cells.js",
    "requests.js",
    "plots.js",
    "trace.js",
    "calls.js",
    "playground.js",
    "trade.js",
    "ops.js",
)


@dataclass(frozen=True, slots=True)
class Page:
    """`policy`: its Content-Security-Policy. It loads nothing, and talks to its own service only."""

    html: bytes
    policy: str


@cache
def page(keys: bool = False) -> Page:
    """Read once: a process serves one version. `keys`: whether the service wants them."""
    style, script = (
        "".join((_FILES / name).read_text(encoding="utf-8") for name in names) for names in (STYLES, SCRIPTS)
    )
    html = (_FILES / "ops.html").read_text(encoding="utf-8")
    for name, text in (("keys", str(keys).lower()), ("style", style), ("script", script)):
        html = html.replace(f"{{{{{name}}}}}", text)
    return Page(html.encode(), _policy(style, script))


def _policy(style: str, script: str) -> str:
    rules = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {allowed}" for name, allowed in rules.items())


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
