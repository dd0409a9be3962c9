"""What Prometheus would get of a Ray that runs."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cluster.ops.scraping import targets
from cluster.watch.metric import Metric

LATE_S = 90.0  # Ray's processes tell their agent each ten seconds


@dataclass(frozen=True)
class Scrape:
    """All samples of one model's metrics: name, labels, value."""

    samples: list[tuple[str, dict[str, str], float]] = field(default_factory=list)

    def total(self, metric: Metric, part: str = "", **labels: str) -> float:
        """Over all processes, of the series with these labels. `part` of a histogram: `_count`, `_sum`."""
        return sum(self.values(metric, part, **labels))

    def values(self, metric: Metric, part: str = "", **labels: str) -> list[float]:
        name = metric.shown_name + part
        return [value for one, has, value in self.samples if one == name and labels.items() <= has.items()]


async def scrape(model: str) -> Scrape:
    samples = []
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        for target in targets():
            text = (await client.get(f"http://{target}/metrics")).raise_for_status().text
            for family in text_string_to_metric_families(text):
                samples += [(s.name, s.labels, s.value) for s in family.samples if s.labels.get("model_name") == model]
    return Scrape(samples)


async def scraped(model: str, arrived: Callable[[Scrape], bool]) -> Scrape:
    """Once this has arrived, which takes a while; or the last that came."""
    began = time.monotonic()
    while True:
        found = await scrape(model)
        if arrived(found) or time.monotonic() - began > LATE_S:
            return found
        await asyncio.sleep(0.5)
