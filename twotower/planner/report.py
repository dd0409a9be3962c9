"""A plan as tables for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from twotower.planner.beside import beside
from twotower.planner.ceilings import MOST_DENOISERS, Planner, Rate
from twotower.planner.devices import BLOCK
from twotower.planner.passes import Batch, Kind, Touched, kv_bytes, state_bytes
from twotower.planner.routing import of_the_demo, touched_by

CONTEXTS = (1 << 10, 8 << 10, 32 << 10, 128 << 10)
_GB, _MIB = 10**9, 2**20
_OURS = ("÷ must: kernels", "greedy", "sampled")
Figures = dict[str, Any]


def figures(planner: Planner, rows: Sequence[int], context: int) -> Figures:
    """All of a plan: bytes, seconds, tokens a second. `rows`: sequences of a pass; `context`: tokens behind each."""
    return {
        "device": planner.device.name,
        "experts": None if planner.config.experts is None else str(planner.config.experts),
        "context": context,
        "assumed": {name: getattr(planner.assumed, name) for name in planner.assumed.__slots__},
        "weights": {"context": planner.context.bytes, "denoiser": planner.denoiser.bytes},
        "sequence": {
            "state_bytes": state_bytes(planner.config),
            "kv_bytes_a_token": kv_bytes(planner.config),
            "wire_bytes_a_block": planner.block_on_the_wire,
            "wire_seconds_a_block": planner.block_on_the_wire / planner.device.link,
        },
        "fits": {str(length): _fits(planner, length) for length in CONTEXTS},
        "passes": [_passes(planner, number, context) for number in rows],
        "routing": _routing(planner, rows, context),
        "our_code": [_our_code(planner, number, context) for number in rows],
        "ceilings": [_ceilings(planner, number, context) for number in rows],
    }


def _fits(planner: Planner, context: int) -> dict[str, int]:
    return {"a tower a device": planner.sequences(context, 1), "colocated": planner.sequences(context, 2)}


def _passes(planner: Planner, rows: int, context: int) -> Figures:
    kinds: Figures = {"rows": rows}
    for kind in Kind:
        cost = planner.cost(kind, rows, context)
        kinds[kind.value] = {
            "seconds": cost.seconds(planner.device, planner.assumed.reached),
            "operations": cost.operations,
            "bytes": {part.name: part.bytes for part in cost.parts},
        }
    return kinds


def _routing(planner: Planner, rows: Sequence[int], context: int) -> Figures:
    """Experts of a layer that a pass touches, and the pass's seconds, for each routing; no passes without experts."""
    told = of_the_demo()
    measured = f"measured on {told.checkpoint} on {told.date} by `{told.command}`"
    source = {"uniform": "derived: the most on average", "demo": f"{measured}; for any other model derived from that"}
    if not planner.config.layers_of("E"):
        return {"counted": planner.routing, "source": source, "passes": []}
    touched = {name: touched_by(name, planner.config) for name in source}
    passes = [_routed(planner, touched, number, context) for number in rows]
    return {"counted": planner.routing, "source": source, "passes": passes}


def _routed(planner: Planner, touched: dict[str, Touched], rows: int, context: int) -> Figures:
    kinds: Figures = {"rows": rows}
    for kind in Kind:
        kinds[kind.value] = {
            name: {
                "experts": of(kind, planner.batch(kind, rows, context)),
                "seconds": planner.cost(kind, rows, context, of).seconds(planner.device, planner.assumed.reached),
            }
            for name, of in touched.items()
        }
    return kinds


def _our_code(planner: Planner, rows: int, context: int) -> Figures:
    """Of a denoiser step: bytes that our kernels move beside those that no implementation can spare."""
    moved = beside(planner.config, Batch(rows, context, BLOCK))
    cost = planner.cost(Kind.DENOISE, rows, context)
    return {
        "rows": rows,
        "must_move": cost.bytes,
        "pages in place": moved.in_place,
        "pages gathered": moved.pages,
        "states gathered": moved.states,
        "decision by the kernel": moved.fused,
        "greedy by torch": moved.greedy,
        "sampled by torch": moved.sampled,
        "times": moved.factors(cost),
    }


def _ceilings(planner: Planner, rows: int, context: int) -> Figures:
    rates = {
        "ar": planner.ar(rows, context),
        "diffusion, colocated": planner.diffusion(rows, context, 0),
        "verified, colocated": planner.verified(rows, context, 0),
        "diffusion, 1:1": planner.diffusion(rows, context, 1),
        "verified, 1:1": planner.verified(rows, context, 1),
        "diffusion, 1:N": planner.best("diffusion", rows, context),
        "verified, 1:N": planner.best("verified", rows, context),
    }
    return {"rows": rows, **{name: _told(rate) for name, rate in rates.items()}}


def _told(rate: Rate) -> Figures:
    return {
        "tokens_a_second_a_device": rate.per_device,
        "devices": rate.devices,
        "denoisers": rate.denoisers,
        "fits": rate.fits,
    }


def text(plan: Figures, source: str) -> str:
    """The same for people."""
    return "\n".join(_lines(plan, source)) + "\n"


def _lines(plan: Figures, source: str) -> Iterator[str]:
    assumed = plan["assumed"]
    but = " but the demo's routing" if plan["routing"]["passes"] else ""
    yield (
        f"Everything here is derived, from shapes and from what the maker publishes ({source}); "
        f"nothing is measured{but}."
    )
    yield (
        f"Assumed: {100 * assumed['reached']:.0f} % of the bandwidth is reached, {100 * assumed['kept_free']:.0f} % of "
        f"the memory stays free; diffusion fixes {assumed['tokens_per_step']:g} tokens a step; verified keeps "
        f"{assumed['tokens_per_round']:g} tokens a round, which takes {assumed['draft_steps']:g} steps and a check; "
        f"experts are touched as by {plan['routing']['counted']} routing."
    )
    experts = f", experts in {plan['experts']}" if plan["experts"] else ""
    yield from ("", f"Weights in bf16{experts}; GB")
    parts = plan["weights"]["context"]
    yield from _table(
        ["tower", *parts, "all"],
        [
            [tower, *(f"{nbytes / _GB:.2f}" for nbytes in of.values()), f"{sum(of.values()) / _GB:.2f}"]
            for tower, of in plan["weights"].items()
        ],
    )
    held = plan["sequence"]
    yield ""
    yield (
        f"Sequences that fit on one {plan['device']} ({held['state_bytes'] / _MIB:.1f} MiB of states each, and "
        f"{held['kv_bytes_a_token'] / 1024:.1f} KiB a token)"
    )
    yield from _table(
        ["tokens of each", *next(iter(plan["fits"].values()))],
        [[length, *("no room" if not n else str(n) for n in fits.values())] for length, fits in plan["fits"].items()],
    )
    yield (
        f"To a denoiser on another device each of them sends {held['wire_bytes_a_block'] / 1e6:.1f} MB a block, "
        f"{1e3 * held['wire_seconds_a_block']:.2f} ms of the link, with Mamba states in {assumed['ssm_wire_dtype']}."
    )
    yield from ("", f"A pass with {plan['context']} tokens behind each row: ms, and GB that it moves")
    yield from _table(
        ["rows", *(kind.value for kind in Kind)],
        [[str(of["rows"]), *(_pass(of[kind.value]) for kind in Kind)] for of in plan["passes"]],
    )
    yield from _two_routings(plan)
    yield from (
        "",
        "A denoiser step by our own code, GB: what it must move, what it moves beside that, all of it ÷ must:",
        "by kernels (pages in place), by plain functions where no row and where every row samples (pages gathered)",
    )
    yield from _table(
        ["rows", *(name.replace("_", " ") for name in list(plan["our_code"][0])[1:8]), *_OURS],
        [_step(of) for of in plan["our_code"]],
    )
    yield from (
        "",
        f"Most tokens a second a device; 1:N is the best of 1 to {MOST_DENOISERS} denoisers a context tower",
    )
    yield from _table(
        list(plan["ceilings"][0]),
        [[str(of["rows"]), *(_rate(rate) for name, rate in of.items() if name != "rows")] for of in plan["ceilings"]],
    )
    yield ""
    yield from _crossings(plan["ceilings"])


def _pass(told: Figures) -> str:
    return f"{_ms(told)} ({sum(told['bytes'].values()) / _GB:.1f})"


def _two_routings(plan: Figures) -> Iterator[str]:
    passes = plan["routing"]["passes"]
    if not passes:
        return
    source = plan["routing"]["source"]
    yield from ("", "Experts of a layer that a pass touches (and its ms): with uniform routing → with the demo's")
    yield from (f"  {name}: {of}" for name, of in source.items())
    yield from _table(
        ["rows", *(kind.value for kind in Kind)],
        [[str(of["rows"]), *(_both(**of[kind.value]) for kind in Kind)] for of in passes],
    )


def _both(uniform: Figures, demo: Figures) -> str:
    """Experts alone where both touch as many."""
    few, many = (f"{of['experts']:.0f}" for of in (demo, uniform))
    return many if few == many else f"{many} ({_ms(uniform)}) → {few} ({_ms(demo)})"


def _ms(told: Figures) -> str:
    return f"{1e3 * told['seconds']:.2f}"


def _step(told: Figures) -> list[str]:
    rows, *moved = (told[name] for name in list(told)[:8])
    return [
        str(rows),
        *(f"{round(nbytes / _GB, 1) + 0.0:.1f}" for nbytes in moved),
        *(f"{x:.2f}" for x in told["times"].values()),
    ]


def _rate(told: Figures) -> str:
    if not told["fits"]:
        return "no room"
    return f"{told['tokens_a_second_a_device']:.0f}" + (f" (N {told['denoisers']})" if told["denoisers"] > 1 else "")


def _crossings(ceilings: Sequence[Figures]) -> Iterator[str]:
    """Where each way is faster than `ar` on as many devices."""
    for name in ceilings[0]:
        if name in ("rows", "ar"):
            continue
        wins = [str(of["rows"]) for of in ceilings if of[name]["fits"] and _speed(of[name]) > _speed(of["ar"])]
        yield f"{name}: faster than ar at {', '.join(wins) or 'no number of'} rows"


def _speed(told: Figures) -> float:
    rate: float = told["tokens_a_second_a_device"]
    return rate


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    for line in (head, *rows):
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
