"""/docs and /openapi.json. The page shows the service's own description, and loads nothing else."""

from functools import cache
from pathlib import Path

from fastapi import FastAPI, Response

from cluster.faces.http.description import openapi
from cluster.faces.http.page_policy import policy

_READ = ["GET", "HEAD"]
_FILES = Path(__file__).parent / "static"


def add_docs(app: FastAPI) -> None:
    """Adds the paths to a router's application."""
    page, allowed = _page()
    described = openapi()

    @app.api_route("/docs", methods=_READ)
    async def docs() -> Response:
        headers = {"content-security-policy": allowed, "referrer-policy": "no-referrer"}
        return Response(page, headers=headers, media_type="text/html")

    @app.api_route("/openapi.json", methods=_READ)
    async def description() -> Response:
        return Response(described, media_type="application/json")


@cache
def _page() -> tuple[bytes, str]:
    """The document, and its policy."""
    html, style, script = ((_FILES / f"docs.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    return html.replace("{{style}}", style).replace("{{script}}", script).encode(), policy(style, script)
