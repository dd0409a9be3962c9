"""A snapshot of the ops page as lines for a terminal. Knows the JSON of `/ops/snapshot`, not where it is from.

Words say each state; colour only repeats it and is optional.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.cli.board_words import NONE, bar, counted, nbytes, number, percent, seconds, spark

Told = Mapping[str, Any]  # the snapshot's JSON
_RED, _YELLOW, _GREEN, _DIM, _BOLD = 31, 33, 32, 2, 1
_RECENT_S = 14  # seconds over which numbers are averaged, so that they stay readable
_MOST_REQUESTS, _MOST_EVENTS = 12, 6


class BoardText:
    """`width` in characters; `colour`: whether the terminal shows any."""

    def __init__(self, width: int, colour: bool) -> None:
        self._width, self._colour = width, colour

    def lines(self, told: Told, url: str) -> list[str]:
        """The most important lines first, because the rest may not fit on the screen. `told["fine"]`:
        all known rows.
        """
        return [
            *self._head(told, url), "",
            *self._now(told), "",
            *self._cells(told), "",
            *self._requests(told), "",
            *self._events(told), "",
            *self._routers(told),
        ]  # fmt: skip

    def paint(self, text: str, *codes: int) -> str:
        return f"\033[{';'.join(map(str, codes))}m{text}\033[0m" if self._colour and codes else text

    def _head(self, told: Told, url: str) -> Iterator[str]:
        deployed = told["routers"][0]["deployed"]
        name = f"TwoTower Serve · {deployed['model']} · {url}/ops"
        yield self.paint(name, _BOLD) + f"  {clock(told['at'])}"
        alerts = told["alerts"]
        if not alerts:
            modes = ", ".join(dict.fromkeys(mode for cell in told["cells"] for mode in cell["modes"]))
            cells = counted(len(told["cells"]), "cell")
            well = f"✓ All is well: {cells} serve {modes}" if told["cells"] else "◐ Starting: no cell has reported yet"
            yield self.paint(well, _BOLD, _GREEN)
        for alert in alerts:
            acts = alert["level"] == "act"
            since = "" if alert["since_s"] is None else f", since {seconds(alert['since_s'])}"
            yield self.paint(
                f"{'✕ act ' if acts else '◐ know'} {alert['text']}{since}", _BOLD, _RED if acts else _YELLOW
            )
            yield self.paint(self._cut(f"       {alert['hint']}"), _DIM)

    def _now(self, told: Told) -> Iterator[str]:
        rows, place = told["fine"], {name: number for number, name in enumerate(told["columns"])}

        def recent(column: str) -> float | None:
            values = [row[place[column]] for row in rows if row[0] > told["at"] - _RECENT_S]
            values = [value for value in values if value is not None]
            return sum(values) / len(values) if values else None

        running, slots = (sum(cell[name] for cell in told["cells"]) for name in ("running", "slots"))
        waiting = sum(one["waiting"] for one in (*told["cells"], *told["routers"]))
        yield from self._wrapped(
            f"tokens/s {number(recent('tokens'))}",
            f"tokens per step {number(recent('tokens_per_step'))}",
            f"first token {seconds(recent('first_token_p50'))} (half), {seconds(recent('first_token_p95'))} (95 %)",
            f"running {running} of {counted(slots, 'slot')}",
            f"waiting {waiting}",
            f"exchange {nbytes(recent('exchange'))}/s",
            f"exposed {percent(recent('exposed'))}",
            f"last minute: failed {self._lately(told, 'failed')}, refused {self._lately(told, 'refused')}",
        )
        for column, name in (("tokens", "tokens/s"), ("running", "running ")):
            values = [row[place[column]] for row in rows[-600:]]
            if len(values) > 1:
                line = spark(values, max(10, self._width - 34))
                yield f"{name} {line} {self.paint(f'last {seconds(len(values))}', _DIM)}"

    def _wrapped(self, *facts: str) -> Iterator[str]:
        line = ""
        for fact in facts:
            if line and len(line) + len(fact) + 3 > self._width:
                yield line
                line = ""
            line = f"{line} · {fact}" if line else fact
        yield line

    def _lately(self, told: Told, kind: str) -> int:
        since = told["at"] - 60
        return sum(event["count"] for event in told["events"] if event["kind"] == kind and event["t"] > since)

    def _cells(self, told: Told) -> list[str]:
        heads = ("cell", "state", "requests", "tower", "device", "busy", "waits for", "free", "cache")
        rows = []
        for cell in sorted(told["cells"], key=lambda cell: (not cell["lacks"], not cell["mending_s"], cell["name"])):
            held = f"{cell['running']} of {cell['slots']}" + (f", {cell['waiting']} wait" if cell["waiting"] else "")
            for place, tower in enumerate(cell["towers"] or [None]):
                first = (short(cell["name"]), _state(cell), held) if place == 0 else ("", "", "")
                rows.append((*first, *_tower(tower)))
        return self._table(heads, rows, "no cells")

    def _requests(self, told: Told) -> list[str]:
        heads = ("request", "mode", "cell", "progress", "block", "steps", "tokens", "age", "quiet for")
        runs = sorted((run for rows in told["requests"].values() for run in rows), key=lambda run: -run["age_s"])
        lines = self._table(heads, [_request(run) for run in runs[:_MOST_REQUESTS]], "no requests under way")
        more = len(runs) + told["more_requests"] - _MOST_REQUESTS
        return [*lines, self.paint(f"… and {more} more", _DIM)] if more > 0 else lines

    def _events(self, told: Told) -> list[str]:
        events = sorted(told["events"], key=lambda event: event["t"])[-_MOST_EVENTS:]
        rows = [(clock(event["t"]), _happened(event)) for event in reversed(events)]
        return self._table(("time", "event"), rows, "no events")

    def _routers(self, told: Told) -> list[str]:
        heads = ("router", "node", "state", "under way", "waiting", "up for", "settings")
        rows = []
        for router in told["routers"]:
            state = "is to end" if router["drains"] else "ready" if router["ready"] else "not ready"
            held, waits = f"{router['open']} of {router['capacity']}", str(router["waiting"])
            up = seconds(router["up_s"])
            rows.append((short(router["name"]), router["node"], state, held, waits, up, router["deployed"]["settings"]))
        return self._table(heads, rows, "no routers")

    def _table(self, heads: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> list[str]:
        if not rows:
            return [self.paint(empty, _DIM)]
        widths = [max(len(row[place]) for row in (heads, *rows)) for place in range(len(heads))]
        lined = [
            self._cut("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
            for row in (heads, *rows)
        ]
        return [self.paint(lined[0], _DIM), *(self._toned(line) for line in lined[1:])]

    def _toned(self, line: str) -> str:
        codes = [_RED] if " ✕ " in line else [_YELLOW] if " ◐ " in line else []
        return self.paint(line, *codes)

    def _cut(self, line: str) -> str:
        return line if len(line) <= self._width else f"{line[: self._width - 1]}…"


def clock(t: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(t))


def short(name: str) -> str:
    return name if len(name) <= 10 else name[:8]


def _happened(event: Told) -> str:
    return f"{event['count']} × {event['text']}" if event["count"] > 1 else str(event["text"])


def _state(cell: Told) -> str:
    if cell["lacks"]:
        return f"✕ {', '.join(cell['modes'])} only" if cell["modes"] else "✕ serves nothing"
    if cell["mending_s"]:
        return f"◐ mends since {seconds(cell['mending_s'])}"
    if cell["leaves"]:
        return "◐ leaves"
    return "✓ all modes"


def _tower(tower: Told | None) -> tuple[str, ...]:
    """A tower's columns; empty for a cell of an older version."""
    if tower is None:
        return ("not told", *[""] * 5)
    if not tower["answers"]:
        return tower["name"], tower["device"], "✕ silent", NONE, NONE, NONE
    busy = f"{bar(tower['busy'], 8)} {percent(tower['busy']):>5}"
    used = (tower["pages"] - tower["free_pages"]) / tower["pages"] if tower["pages"] else 0.0
    return tower["name"], tower["device"], busy, _waits_for(tower), nbytes(tower["free_memory"]), percent(used)


def _waits_for(tower: Told) -> str:
    commits, prompts = tower["commit_wait"], tower["prompt_wait"]
    idle = max(0.0, 1 - tower["busy"] - commits - prompts)
    rest = "denoiser" if tower["name"] == "context" and tower["sequences"] else "work"
    waits = [(commits, "commits"), (prompts, "prompts"), (idle, rest)]
    return ", ".join(f"{what} {percent(share)}" for share, what in waits if share >= 0.005) or "nothing"


def _request(run: Told) -> tuple[str, ...]:
    whole = run["most_blocks"]
    place = short(run["cell"]) if run["cell"] else "waits"
    steps = f"{number(run['steps'])} ({run['steps_of'][-1]})" if run["steps_of"] else NONE
    tokens = f"{run['tokens']} of {run['most_tokens']}" if run["most_tokens"] else NONE
    name = run["id"].removeprefix("req-").removeprefix("cmpl-")[:8]
    done = bar(run["blocks"] / whole if whole else 0.0, 20)
    block = f"{run['blocks']} of {whole}" if whole else NONE
    return name, run["mode"], place, done, block, steps, tokens, seconds(run["age_s"]), seconds(run["quiet_s"])
