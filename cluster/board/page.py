"""The ops page as one document: the files of `static/` put together, and a policy that allows these alone."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cluster.faces.http.page_policy import policy

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
    return Page(html.encode(), policy(style, script))
