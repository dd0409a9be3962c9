"""What a cluster goes through: a steady load, one that the policy sizes, a step, a rolling change, a loss, too much."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from benchmarks.simulate_parts.clock import simulated
from benchmarks.simulate_parts.costs import PlannedCosts
from benchmarks.simulate_parts.lengths import LENGTHS, Asked, draw
from benchmarks.simulate_parts.router import Outcome, RouterCosts
from benchmarks.simulate_parts.serve import Pace
from benchmarks.simulate_parts.simulation import Cluster, Happening, Result, Setting
from cluster.config import ServiceConfig, load_config
from twotower.errors import ConfigError
from twotower.planner.ceilings import Planner
from twotower.planner.devices import Assumed, device_named
from twotower.planner.released import RELEASED

LONGEST, MOST_TOKENS, _LOST = 8192, 1024, 0.1
_PAGES_FOR = 2560  # tokens of a slot, on average: pages for more than 99 % of what is drawn at once


@dataclass(frozen=True, slots=True)
class Scale:
    """How big, and of what. `rate` in requests a second, `start_s` of a cell."""

    cells: int
    rate: float
    seconds: float
    device: str = "h200"
    context: int = 2048
    lengths: str = "conversation"
    denoisers: int = 0
    tokens_per_step: float = 2.85
    start_s: float = 90.0
    request_s: float = 0.0056
    event_s: float = 0.00017
    settings: tuple[str, ...] = ()
    seed: int = 1

    def __post_init__(self) -> None:
        if self.lengths not in LENGTHS:
            raise ConfigError(f"--lengths: got {self.lengths!r}, wanted one of {', '.join(LENGTHS)}")

    def costs(self) -> PlannedCosts:
        planner = Planner(RELEASED, device_named(self.device), Assumed(tokens_per_step=self.tokens_per_step))
        return PlannedCosts(planner, self.context)

    def config(self, routers: int, cluster: Sequence[str] = ()) -> ServiceConfig:
        slots = 32
        for setting in self.settings:
            if setting.startswith("cell.max_sequences="):
                slots = int(setting.partition("=")[2])
        own = [
            f"model.max_sequence_length={LONGEST}", f"cell.cache_tokens={max(LONGEST, _PAGES_FOR * slots)}",
            "cell.device=cpu", f"cell.placement={'split' if self.denoisers else 'colocated'}",
            f"cell.denoisers_per_context={max(1, self.denoisers)}",
            f"cluster.min_cells={self.cells}", f"cluster.max_cells={self.cells}", f"cluster.num_routers={routers}",
        ]  # fmt: skip
        return load_config(None, [*own, *cluster, *self.settings])

    def draw(self, random: Random) -> Asked:
        return draw(LENGTHS[self.lengths], self.tokens_per_step, LONGEST - MOST_TOKENS, MOST_TOKENS, random)


@dataclass(frozen=True, slots=True)
class Scenario:
    """`rates`: shares of the load, from which share of the time on. `happens` at a third of the time."""

    name: str
    what: str
    rates: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    cells: float = 1.0
    scales: bool = False
    cluster: tuple[str, ...] = ()
    happens: Callable[[Cluster], None] | None = None

    def requests(self, scale: Scale) -> int:
        """About so many."""
        ends = [*(start for start, _ in self.rates[1:]), 1.0]
        whole = scale.rate * scale.seconds
        return round(sum(rate * (end - start) * whole for (start, rate), end in zip(self.rates, ends, strict=True)))


@dataclass(frozen=True, slots=True)
class Ran:
    scenario: Scenario
    routers: int
    result: Result
    until: float
    source: str


def scenarios(scale: Scale) -> list[Scenario]:
    """All of them, at this scale."""
    least = max(1, scale.cells // 20)
    scaling = (f"cluster.min_cells={least}", "cluster.downscale_delay_s=15")
    tenth = max(1, round(_LOST * scale.cells))
    return [
        Scenario("steady", "all cells, nothing changes"),
        Scenario("scaled", "the policy decides how many there are, beginning with all", scales=True, cluster=scaling),
        Scenario(
            "step", "a quarter of the load and of the cells; from a third to two thirds of the time all of the load",
            ((0.0, 0.25), (1 / 3, 1.0), (2 / 3, 0.25)), 0.25, True, scaling,
        ),
        Scenario("change", "new settings: a tenth of the cells at a time", happens=lambda it: _change(it, tenth)),
        Scenario("loss", "a tenth of the cells falls silent at once", happens=lambda it: _lose(it, tenth)),
        Scenario("too much", "a sixteenth of the cells", cells=1 / 16),
    ]  # fmt: skip


def _change(cluster: Cluster, at_once: int) -> None:
    cluster.controller.replace_all(at_once)


def _lose(cluster: Cluster, number: int) -> None:
    cells = list(cluster.controller.cells.values())
    for cell in cluster.random.sample(cells, min(number, len(cells))):
        cluster.controller.kill(cell, silent=True)


def run(one: Scenario, scale: Scale, routers: int, told: Callable[[Outcome], object]) -> Ran:
    """The scenario with so many routers."""
    cells = max(1, round(one.cells * scale.cells))
    fixed = () if one.scales else (f"cluster.min_cells={cells}", f"cluster.max_cells={cells}")
    costs = scale.costs()
    setting = Setting(
        scale.config(routers, [*one.cluster, *fixed]), costs, cells, routers,
        RouterCosts(scale.request_s, scale.event_s), replace(Pace(), start_s=scale.start_s), scale.denoisers,
        one.scales, most_tokens=MOST_TOKENS,
    )  # fmt: skip
    rates = [(start * scale.seconds, share * scale.rate) for start, share in one.rates]
    happenings = [] if one.happens is None else [Happening(scale.seconds / 3, one.what, one.happens)]

    async def work() -> Result:
        return await Cluster(setting, scale.seed, told).open_loop(rates, scale.seconds, scale.draw, happenings)

    return Ran(one, routers, simulated(work()), scale.seconds, costs.source)
