"""`status`: the state of a service, once or repeatedly: the content of its ops page, in a terminal."""

import argparse
import http.client
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from cluster.cli import asking, tls
from cluster.cli.board_text import BoardText
from cluster.cli.board_words import seconds
from cluster.ops import run_state
from cluster.ops.run_state import RunState
from twotower.errors import ConfigError, Unavailable
from twotower_client import KEY_VARIABLE

_TIMEOUT_S, _PACE_S = 5.0, 1.0
# The address is used directly: the environment's proxies are ignored.
_KNOWN_S = 600  # seconds of points to keep
_RETOLD_S = 15  # seconds that are asked for again, because routers may report late
_ALTERNATE, _BACK = "\033[?1049h\033[?25l", "\033[?25h\033[?1049l"  # a screen of its own, without a cursor
_HOME, _CLEAR_LINE, _CLEAR_REST = "\033[H", "\033[K", "\033[J"


def run(options: argparse.Namespace) -> int:
    """Exit code 1: the service is not ready."""
    if options.address is not None and options.http_port is not None:
        raise ConfigError("--http-port: got --address too, which names the service already")
    state = None if options.address is not None else run_state.the_one(options.http_port)[1]
    address: str = options.address if state is None else state.http
    if options.watch:
        return watch(Snapshots(address))
    if state is None:
        return print_board(Snapshots(address))
    served = asking.served(address, over_tls=state.cert_file is not None)
    print_note(state, served)
    return 1 if served is None else 0


def print_note(state: RunState, served: Mapping[str, bool] | None) -> None:
    """Print the known facts about this user's `up`."""
    rows = [("ready", "no" if served is None else "yes"), ("pid", str(state.pid))]
    rows += [("HTTP", state.url), ("gRPC", state.grpc), ("cells", str(state.cells))]
    if served is not None:
        rows += [("modes", ", ".join(mode if serves else f"{mode} (not now)" for mode, serves in served.items()))]
        rows += _model(state)
    for name, value in rows:
        print(f"{name:<20} {value}")


def _model(state: RunState) -> list[tuple[str, str]]:
    """Print the served model; without a key, only the public facts."""
    try:
        info = asking.model_info(state.grpc)
    except asking.Refused as refused:
        return [("model", f"not told: {refused}")]
    model = f"{info.name} ({info.checkpoint_layout}, {info.checkpoint_fingerprint})"
    return [
        ("model", model),
        ("max_sequence_length", str(info.max_sequence_length)),
        ("version", str(info.version)),
    ]


def print_board(snapshots: "Snapshots") -> int:
    told = snapshots.next()
    print("\n".join(_text(sys.stdout.isatty()).lines(told, snapshots.url)))
    return 0 if any(router["ready"] for router in told["routers"]) else 1


def watch(snapshots: "Snapshots", pace: Callable[[float], None] = time.sleep) -> int:
    """Repeat until Ctrl-C. If the output is no terminal, print one snapshot after the other."""
    is_terminal = sys.stdout.isatty()
    lines = _text(is_terminal).lines(snapshots.next(), snapshots.url)  # errors are printed before the screen is cleared
    if is_terminal:
        sys.stdout.write(_ALTERNATE)
    try:
        while True:
            _show(lines, is_terminal)
            pace(_PACE_S)
            lines = _next_lines(snapshots, is_terminal)
    except KeyboardInterrupt:
        return 0
    finally:
        if is_terminal:
            sys.stdout.write(_BACK)
            sys.stdout.flush()


class Snapshots:
    """Snapshots of the service at this address. Points are kept, so that each request asks only for the news."""

    def __init__(self, address: str) -> None:
        self.address, self.url = address, tls.url(address)
        self.told: dict[str, Any] | None = None
        self._heard_at = time.monotonic()

    @property
    def silent_s(self) -> float:
        """How long the service has not answered."""
        return time.monotonic() - self._heard_at

    def next(self) -> dict[str, Any]:
        """Raises Unavailable if the service does not answer, and ConfigError if it has no ops page."""
        known = self.told
        since = int(time.time()) - _KNOWN_S if known is None else int(known["at"]) - _RETOLD_S
        told = _snapshot(self.address, since)
        if known is not None:
            rows = {row[0]: row for row in (*known["fine"], *told["fine"]) if row[0] > told["at"] - _KNOWN_S}
            events = {(event["t"], event["text"]): event for event in (*known["events"], *told["events"])}
            told |= {"fine": [rows[t] for t in sorted(rows)], "events": [*events.values()][-200:]}
        self.told, self._heard_at = told, time.monotonic()
        return told


def _snapshot(address: str, since: int) -> dict[str, Any]:
    url = tls.url(address)
    try:
        request = urllib.request.Request(f"{url}/ops/snapshot?since={since}", headers=dict(asking.credentials()))
        with tls.opened(request, address, _TIMEOUT_S) as response:
            told: Any = json.load(response)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise ConfigError(f"{address}: has no ops page; wanted a service with ingress.ops_page: true") from None
        if error.code == 401:
            raise ConfigError(f"{address}: requires a key; set the variable {KEY_VARIABLE}") from None
        raise Unavailable(f"{address}: answers {error.code} {error.reason}") from None
    except http.client.RemoteDisconnected:
        hint = "" if url.startswith("https:") else f"; if it speaks TLS, set {tls.CA_VARIABLE}"
        raise Unavailable(f"{url}: the connection was closed without an answer{hint}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unavailable(f"no service answers on {url}: {error}") from None
    if not isinstance(told, dict) or "alerts" not in told:
        raise Unavailable(f"{address}: its answer on /ops/snapshot is not a snapshot of ours")
    return dict(told)


def _next_lines(snapshots: Snapshots, is_terminal: bool) -> list[str]:
    text = _text(is_terminal)
    try:
        told = snapshots.next()
    except Unavailable as error:
        assert snapshots.told is not None
        gone = text.paint(f"✕ no answer for {seconds(snapshots.silent_s)}: {error}", 1, 31)
        return [gone, *text.lines(snapshots.told, snapshots.url)]
    return text.lines(told, snapshots.url)


def _text(is_terminal: bool) -> BoardText:
    width = shutil.get_terminal_size((120, 40)).columns
    return BoardText(width if is_terminal else max(width, 120), is_terminal and not os.environ.get("NO_COLOR"))


def _show(lines: list[str], is_terminal: bool) -> None:
    """Overwrite the last snapshot without flicker; lines that do not fit are counted."""
    if not is_terminal:
        print("\n".join(lines), flush=True)
        return
    height = shutil.get_terminal_size((120, 40)).lines
    shown = lines if len(lines) <= height else [*lines[: height - 1], f"… {len(lines) - height + 1} more lines"]
    sys.stdout.write(_HOME + "\n".join(line + _CLEAR_LINE for line in shown) + _CLEAR_REST)
    sys.stdout.flush()
