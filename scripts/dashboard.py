"""The dashboard for Grafana: which panels there are, and what each asks Prometheus.

Queries are made from the declarations of metrics, and so are the panels' explanations. Knows nothing of files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.watch import cell_metrics as cell
from cluster.watch import router_metrics as router
from cluster.watch.metric import Kind, Metric, declared_in

WIDTH = 24  # of Grafana's grid
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_CHOSEN = 'model_name=~"$model", namespace=~"$namespace"'
_METRICS = {metric.shown_name: metric for module in (router, cell) for metric in declared_in(vars(module))}


def of(metric: Metric, *matchers: str, part: str = "") -> str:
    """Its series of the models that are looked at."""
    return f"{metric.shown_name}{part}{{{', '.join((_CHOSEN, *matchers))}}}"


def rate(metric: Metric, *matchers: str) -> str:
    assert metric.kind is Kind.COUNTER, metric.name
    return f"rate({of(metric, *matchers)}[$__rate_interval])"


def total(value: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) ({value})" if by else f"sum({value})"


def recent(metric: Metric, *by: str) -> str:
    """What is rare: how many in five minutes."""
    assert metric.kind is Kind.COUNTER, metric.name
    return total(f"increase({of(metric)}[5m])", *by)


def ratio(above: Metric, below: Metric, *by: str) -> str:
    return f"{total(rate(above), *by)} / {total(rate(below), *by)}"


def quantiles(metric: Metric, *by: str, shares: tuple[float, ...] = (0.5, 0.95)) -> dict[str, str]:
    assert metric.kind is Kind.HISTOGRAM, metric.name
    buckets = total(f"rate({of(metric, part='_bucket')}[$__rate_interval])", *by, "le")
    labels = "".join(f"{{{{{label}}}}} " for label in by)
    return {f"{labels}p{share * 100:g}": f"histogram_quantile({share:g}, {buckets})" for share in shares}


@dataclass(frozen=True)
class Panel:
    """`queries` by legend. `unit` in Grafana's words. `note`: what the metrics' own meanings do not say."""

    title: str
    unit: str
    queries: dict[str, str]
    note: str = ""
    kind: str = "timeseries"
    stacked: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return (3, 4) if self.kind == "stat" else (8, 8)


def stat(title: str, unit: str, query: str) -> Panel:
    return Panel(title, unit, {title: query}, kind="stat")


FILES = [
    Panel(
        "Until certificates end",
        "s",
        {"{{face}}": f"min by (face) ({of(router.CERTIFICATE_LEFT)})"},
    ),
    Panel("Files not taken", "short", {"{{file}}": f"max by (file) ({of(router.FILE_FAULT)})"}),
]
NOW = [
    stat("Routers ready", "short", total(of(router.READY))),
    stat("Cells", "short", f"max({of(router.CELLS)})"),
    stat("Modes without a cell", "short", f"count(max by (mode) ({of(router.CELLS)}) == 0) or vector(0)"),
    stat("Running", "short", total(of(cell.RUNNING))),
    stat("Waiting", "short", total(of(router.WAITING))),
    stat("Tokens a second", "short", total(rate(router.TOKENS))),
    stat("Tokens per step", "short", ratio(router.COMMITTED, router.STEPS)),
    stat("Errors a second", "short", total(rate(router.FAILURE, 'code!="CANCELLED"'))),
]
REQUESTS = [
    Panel(
        "Requests that ended well",
        "reqps",
        {"{{mode}} {{finished_reason}}": total(rate(router.SUCCESS), "mode", "finished_reason")},
        stacked=True,
    ),
    Panel(
        "Errors",
        "reqps",
        {
            "{{mode}} {{code}}": total(rate(router.FAILURE), "mode", "code"),
            "refused {{code}}": total(rate(router.REFUSED), "code"),
            "{{limit}} of {{key}}": total(rate(router.KEY_LIMITS), "key", "limit"),
        },
        note="CANCELLED is a client that left. Limits are those of keys.",
    ),
    Panel(
        "Requests in the service",
        "short",
        {
            "running in {{cell}}": total(of(cell.RUNNING), "cell"),
            "waiting at {{cell}}": total(of(router.WAITING), "cell"),
            "in routers": total(of(router.OPEN)),
        },
    ),
]
LATENCIES = [
    Panel("Longest wait in a queue", "s", {"longest": f"max({of(router.LONGEST_WAIT)})"}),
    Panel("Time until a cell takes a request", "s", quantiles(router.QUEUE_TIME, "mode")),
    Panel("Time to first token", "s", quantiles(router.FIRST_TOKEN, "mode", shares=(0.5, 0.95, 0.99))),
    Panel("From one block to the next", "s", quantiles(router.BETWEEN_BLOCKS, "mode")),
    Panel("Time per output token", "s", quantiles(router.TOKEN_TIME, "mode")),
    Panel("Whole requests", "s", quantiles(router.LATENCY, "mode")),
]
DECODING = [
    Panel(
        "Tokens a second",
        "short",
        {
            "{{mode}}": total(rate(router.TOKENS), "mode"),
            "prompts of {{mode}}": total(rate(router.PROMPT_TOKENS), "mode"),
        },
    ),
    Panel(
        "Tokens per step of diffusion",
        "short",
        {
            "tokens per step": ratio(router.COMMITTED, router.STEPS),
            "positions per step": ratio(router.CANVAS, router.STEPS),
        },
        note="Speed for free: the more tokens a step fixes, the fewer steps an answer takes.",
    ),
    Panel("Steps per block", "short", quantiles(router.BLOCK_STEPS)),
    Panel("Drafted tokens that stand", "percentunit", {"accepted": ratio(router.ACCEPTED, router.DRAFTED)}),
    Panel(
        "A round of verified",
        "short",
        {
            "tokens drafted": ratio(router.DRAFTED, router.DRAFTS),
            "tokens accepted": ratio(router.ACCEPTED, router.DRAFTS),
            "denoiser steps": ratio(router.DRAFT_STEPS, router.DRAFTS),
        },
    ),
    Panel("Blocks a second", "short", {"{{mode}}": total(rate(router.BLOCKS), "mode")}),
    Panel("Blocks of auto a second", "short", {"{{chosen}}": total(rate(router.AUTO_BLOCKS), "chosen")}),
    Panel(
        "Near-ties per thousand tokens",
        "short",
        {"near-ties": f"1000 * {ratio(cell.NEAR_TIES, router.TOKENS)}"},
    ),
]
EXCHANGE = [
    Panel("Bytes over the exchange", "Bps", {"{{cell}} {{tower}}": total(rate(cell.EXCHANGED), "cell", "tower")}),
    Panel(
        "Share of time that denoisers stand still",
        "percentunit",
        {"{{cell}} {{tower}} for {{reason}}": total(rate(cell.EXPOSED), "cell", "tower", "reason")},
        note="Of one request alone much is usual: it has to wait for its own commits.",
    ),
    Panel(
        "Speed of the links",
        "Bps",
        {"{{cell}} {{tower}}": ratio(cell.EXCHANGED, cell.EXCHANGE_TIME, "cell", "tower")},
    ),
    Panel("Payloads a second", "short", {"{{cell}} {{tower}}": total(rate(cell.PAYLOADS), "cell", "tower")}),
]
TOWERS = [
    Panel("Cells that serve a mode", "short", {"{{mode}}": f"max by (mode) ({of(router.CELLS)})"}),
    Panel("Busy share", "percentunit", {"{{cell}} {{tower}}": total(rate(cell.BUSY), "cell", "tower")}),
    Panel("Mean batch", "short", {"{{cell}} {{tower}}": ratio(cell.ROWS, cell.TICKS, "cell", "tower")}),
    Panel(
        "Passes without memory a second",
        "short",
        {"{{cell}} {{tower}}": total(rate(cell.OUT_OF_MEMORY), "cell", "tower")},
        note="Their rows are tried in halves or fail. More than none: too many sequences for the device.",
    ),
    Panel(
        "Slots",
        "short",
        {
            "{{cell}} {{tower}}": total(of(cell.SLOTS_USED), "cell", "tower"),
            "{{cell}} {{tower}} at most": total(of(cell.SLOTS), "cell", "tower"),
        },
    ),
    Panel(
        "Pages",
        "short",
        {
            "{{cell}} {{tower}}": total(f"{of(cell.CACHE_USED)} * {of(cell.PAGES)}", "cell", "tower"),
            "{{cell}} {{tower}} at most": total(of(cell.PAGES), "cell", "tower"),
        },
    ),
    Panel(
        "Prompts that began with a kept prefix",
        "percentunit",
        {"{{cell}}": ratio(cell.PREFIX_HITS, cell.PREFIX_LOOKUPS, "cell")},
        note="Of those long enough to begin with one.",
    ),
    Panel("Prompt tokens a second that were kept", "short", {"{{cell}}": total(rate(cell.PREFIX_TOKENS), "cell")}),
    Panel("Bytes of kept prefixes", "bytes", {"{{cell}}": total(of(cell.PREFIX_BYTES), "cell")}),
    Panel("Kept prefixes that gave way, a second", "short", {"{{cell}}": total(rate(cell.PREFIX_EVICTIONS), "cell")}),
    Panel("Free memory", "bytes", {"{{cell}} {{tower}}": f"min by (cell, tower) ({of(cell.FREE_MEMORY)})"}),
]
LOSSES = [
    Panel(
        "Moves to another cell in five minutes",
        "short",
        {"{{mode}} {{reason}}": recent(router.MOVES, "mode", "reason")},
    ),
    Panel("Blocks read again in five minutes", "short", {"{{mode}}": recent(router.REPLAYED, "mode")}),
    Panel("Pause of a request that lost its cell", "s", quantiles(router.PAUSE, "mode")),
    Panel("Mending", "s", {"{{cell}}": f"max by (cell) ({of(cell.MENDING)})"}),
    Panel("Mends in five minutes", "short", {"{{cell}}": recent(cell.MENDED, "cell")}),
]
ROWS = {
    "Now": NOW,
    "Requests": REQUESTS,
    "Latencies": LATENCIES,
    "Files": FILES,
    "Decoding": DECODING,
    "Exchange between the towers": EXCHANGE,
    "Cells and towers": TOWERS,
    "Losses and mending": LOSSES,
}


def explained(panel: Panel) -> str:
    """The note, and what each metric of the queries means."""
    asked = dict.fromkeys(re.findall(r"ray_twotower_\w+", " ".join(panel.queries.values())))
    names = dict.fromkeys(re.sub("_bucket$", "", name) for name in asked)
    told = [f"`{name}` ({_METRICS[name].unit}): {_METRICS[name].meaning}" for name in names]
    return "\n\n".join(filter(None, (panel.note, *told)))


def drawn(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """A panel as Grafana keeps it."""
    width, height = panel.size
    custom: dict[str, Any] = {"fillOpacity": 20 if panel.stacked else 0, "showPoints": "never"}
    if panel.stacked:
        custom["stacking"] = {"mode": "normal"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": explained(panel),
        "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": height},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list"}, "tooltip": {"mode": "multi"}} if panel.kind != "stat" else {},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
            for place, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def panels() -> Iterator[dict[str, Any]]:
    """All of them, each row of the dashboard under its title."""
    number, y = 0, 0
    for title, row in ROWS.items():
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
            "panels": [],
        }
        x, y = 0, y + 1
        for panel in row:
            width, height = panel.size
            if x + width > WIDTH:
                x, y = 0, y + height
            number += 1
            yield drawn(panel, number, x, y)
            x += width
        y += height


def variables() -> list[dict[str, Any]]:
    """What a reader chooses: where the numbers are, and whose."""
    chosen = {"type": "query", "datasource": _SOURCE, "refresh": 2, "includeAll": True, "allValue": ".*", "multi": True}
    everything = {"text": ["All"], "value": ["$__all"]}
    of_routers = router.READY.shown_name
    return [
        {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        *(
            chosen
            | {"name": name, "label": name, "query": f"label_values({of_routers}, {label})", "current": everything}
            for name, label in {"namespace": "namespace", "model": "model_name"}.items()
        ),
    ]


def alerts() -> dict[str, Any]:
    """Where one of ours fired: a mark across all panels."""
    firing = 'ALERTS{alertname=~"TwoTower.*", alertstate="firing", model_name=~"$model|"}'
    mark = {"name": "Alerts", "datasource": _SOURCE, "enable": True, "iconColor": "red", "expr": firing}
    return mark | {"titleFormat": "{{alertname}}", "textFormat": "{{cell}} {{mode}} {{tower}}"}


def dashboard() -> str:
    """As a file that Grafana imports or is provisioned with."""
    whole = {
        "uid": "twotower",
        "title": "TwoTower Serve",
        "tags": ["twotower"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables()},
        "annotations": {"list": [alerts()]},
        "panels": list(panels()),
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
