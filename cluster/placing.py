"""Where towers and routers run: the meaning of `auto` in `cell.placement` and `cell.device`, and of a missing
`cluster.num_routers`, in a given cluster.

Takes nodes, returns settings and a reason, without any calls. A cell is on one node, so the largest node decides, not
the sum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.settings import resolve_device, tower_processes
from cluster.config import ServiceConfig
from cluster.sections import CellSection

Nodes = Sequence[Mapping[str, float]]  # the resources of each node, by Ray's names: CPU, GPU
_TOWERS = 2
_ROUTERS = 2  # with several nodes, so that one may fail
ROUTER_CPUS = 0.1
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Choice:
    """The configuration without `auto`, and the reason in one line."""

    config: ServiceConfig
    why: str


def choose(config: ServiceConfig, nodes: Nodes) -> Choice:
    """The same configuration and nodes give the same choice; a choice's own configuration gives itself."""
    cell, gpus, cores = config.cell, largest(nodes, "GPU"), largest(nodes, "CPU")
    placement, why = _placement(cell, gpus, cores)
    processes = tower_processes(placement, cell.denoisers_per_context)
    device = resolve_device(cell.device, processes, cell.gpus_per_tower, gpus)
    if cell.placement == "split" and cell.denoisers_per_context == 1 and device.device == "cpu" and cores <= _TOWERS:
        why += f"; with {_cores(cores)} colocated is faster"
    chosen = cell.model_copy(update={"placement": placement, "device": device.device})
    routers, why_routers = _routers(config.cluster.num_routers, nodes)
    cluster = config.cluster.model_copy(update={"num_routers": routers})
    told = f"placement {why}; {device.why}; {why_routers}"
    return Choice(config.model_copy(update={"cell": chosen, "cluster": cluster}), told)


def _routers(asked: int | None, nodes: Nodes) -> tuple[int, str]:
    """Enough routers that one survives the loss of a node. Serve spreads them over the nodes."""
    if asked is not None:
        return asked, f"{asked} {'router' if asked == 1 else 'routers'}, as configured"
    able = sum(node.get("CPU", 0.0) >= ROUTER_CPUS for node in nodes)
    if able > 1:
        return _ROUTERS, f"{_ROUTERS} routers: {able} nodes have cores"
    return 1, "1 router: " + ("one node has cores" if able else "no node has cores")


def _placement(cell: CellSection, gpus: float, cores: float) -> tuple[str, str]:
    """A placement and its reason. `ar_only` is never chosen, because it does not serve all modes."""
    if cell.placement != "auto":
        return cell.placement, f"{cell.placement}, as configured"
    if cell.denoisers_per_context > 1:
        return "split", f"auto is split: cell.denoisers_per_context is {cell.denoisers_per_context}"
    if cell.ssm_wire_dtype != "float32":
        return "split", f"auto is split: cell.ssm_wire_dtype is {cell.ssm_wire_dtype}"
    return _on_gpus(cell, gpus) or _on_cores(cores)


def _on_gpus(cell: CellSection, gpus: float) -> tuple[str, str] | None:
    """None if the towers run on the CPU."""
    each = 1.0 if cell.gpus_per_tower is None else cell.gpus_per_tower
    if cell.device == "cpu" or (cell.device == "auto" and (each == 0 or gpus < each)):
        return None
    if each < 1:  # NCCL cannot join two processes on one GPU
        return "colocated", f"auto is colocated: cell.gpus_per_tower is {each:g}, and two processes need a GPU each"
    if gpus >= _TOWERS * each:
        return "split", f"auto is split: a node has {gpus:g} GPUs, {each:g} for each tower"
    if gpus >= each:
        return "colocated", f"auto is colocated: a node has {gpus:g} GPU for both towers"
    return "split", "auto is split: no node has a GPU yet, and a cell gets one for each tower"


def _on_cores(cores: float) -> tuple[str, str]:
    """Towers that take all cores leave none for router, cell and clients."""
    if cores > _TOWERS:
        return "split", f"auto is split: a node has {_cores(cores)}, one for each tower and more"
    return "colocated", f"auto is colocated: a node has {_cores(cores)}, split wants more than {_TOWERS}"


def missing(cell: Sequence[Mapping[str, float]], cells: int, nodes: Nodes) -> str | None:
    """The resources that `cells` cells of these bundles need beyond the nodes', in words; None if all fit."""
    wanted = {name: sum(bundle.get(name, 0.0) for bundle in cell) for name in ("GPU", "CPU")}
    room = sum(_cells_on(node, wanted) for node in nodes)
    if room >= cells:
        return None
    there = {name: sum(node.get(name, 0.0) for node in nodes) for name in wanted}
    lacking = [
        f"{cells * number:g} {name}s where Ray has {there[name]:g}"
        for name, number in wanted.items()
        if cells * number > there[name] + _ROUNDING
    ]
    if not lacking:
        one = " and ".join(f"{number:g} {name}s" for name, number in wanted.items() if number)
        lacking = [f"a node with {one} each, Ray has room for {room}"]
    return f"{cells} {'cell wants' if cells == 1 else 'cells want'} {' and '.join(lacking)}"


def _cells_on(node: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    return int(min(node.get(name, 0.0) / number + _ROUNDING for name, number in wanted.items() if number))


def largest(nodes: Nodes, resource: str) -> float:
    """The largest amount of this resource on a node."""
    return max((node.get(resource, 0.0) for node in nodes), default=0.0)


def _cores(number: float) -> str:
    return f"{number:g} {'core' if number == 1 else 'cores'}"
