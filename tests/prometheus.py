"""Prometheus and its promtool, which are system programs: Debian's package `prometheus` has both."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

_END_S = 10.0


def require(program: str) -> str:
    """The program's path. Skips where it is not installed; fails there when REQUIRE_ALL=1."""
    path = shutil.which(program)
    if path is None:
        message = f"{program} is not installed: Debian's package `prometheus` has it, scripts/system.sh installs it"
        if os.environ.get("REQUIRE_ALL") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return path


def promtool(*arguments: str) -> tuple[bool, str]:
    """Whether it found all well, and what it said."""
    ran = subprocess.run([require("promtool"), *arguments], capture_output=True, text=True, timeout=100)
    return ran.returncode == 0, ran.stdout + ran.stderr


class Prometheus:
    """One that runs, as its API answers."""

    def __init__(self, address: str, log: Path) -> None:
        self._address, self._log = address, log

    async def firing(self, model: str) -> dict[str, dict[str, str]]:
        """What operators are told of this model now: annotations by the alert's name."""
        found = (await self._get("alerts"))["alerts"]
        fires = [one for one in found if one["state"] == "firing" and one["labels"].get("model_name") == model]
        return {one["labels"]["alertname"]: one["annotations"] for one in fires}

    async def query(self, query: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = (await self._get("query", query=query))["result"]
        return result

    async def _get(self, what: str, **parameters: str) -> Any:
        transport = httpx.AsyncHTTPTransport(retries=5)  # it may be starting
        async with httpx.AsyncClient(transport=transport, timeout=10) as client:
            answer = await client.get(f"http://{self._address}/api/v1/{what}", params=parameters)
        assert answer.status_code == 200, f"{answer.text}\n{self._log.read_text()[-2000:]}"
        return answer.json()["data"]


@contextmanager
def running_prometheus(
    directory: Path, address: str, targets: Sequence[str], groups: dict[str, Any]
) -> Iterator[Prometheus]:
    """Scrapes our metrics of these targets, and evaluates these groups of rules, every few seconds. A scrape that takes
    longer counts as failed, and gives no samples.
    """
    (directory / "rules.yaml").write_text(yaml.safe_dump(groups))
    ours = {"source_labels": ["__name__"], "regex": "ray_twotower_.*", "action": "keep"}
    job = {"job_name": "ray", "static_configs": [{"targets": [*targets]}], "metric_relabel_configs": [ours]}
    every = {"scrape_interval": "4s", "scrape_timeout": "4s", "evaluation_interval": "1s"}
    config = {"global": every, "rule_files": ["rules.yaml"], "scrape_configs": [job]}
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = [
        *("setpriv", "--pdeathsig", "KILL", require("prometheus")),  # it does not outlive these tests
        f"--config.file={directory / 'prometheus.yaml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (directory / "log").open("wb") as log:
        running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield Prometheus(address, directory / "log")
    finally:
        running.terminate()
        try:
            running.wait(_END_S)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
