"""What lies behind the table of targets, a section each."""

import statistics

from benchmarks.engine_parts import ceiling as ceilings
from benchmarks.engine_parts.bare import AR, COMMIT, DENOISE, PROMPT
from benchmarks.engine_parts.ceiling import simple_ratio, turns_ceiling
from benchmarks.engine_parts.experiment import PAUSE_S, SERVED_TIMES, SWEEPS, Kind, Loaded, Square
from benchmarks.engine_parts.figures import Figures
from benchmarks.engine_parts.load import diffusion_gaps
from benchmarks.engine_parts.shares import crossings_ms, percentile
from benchmarks.reference.report import spread, table
from twotower.core import Mode

_KINDS = (
    Kind(DENOISE),
    Kind(DENOISE, decide=True),
    Kind(DENOISE, eager=True),
    Kind(DENOISE, both=True),
    Kind(DENOISE, decide=True, both=True),
    Kind(DENOISE, rested=True),
    Kind(COMMIT),
    Kind(COMMIT, eager=True),
    Kind(COMMIT, both=True),
    Kind(COMMIT, rested=True),
    Kind(AR),
    Kind(AR, decide=True),
    Kind(AR, eager=True),
    Kind(PROMPT),
    Kind(PROMPT, eager=True),
)


def bare_passes(figures: Figures) -> str:
    passes, rows = figures.results.passes, figures.plan.rows
    body = []
    for kind in _KINDS:
        taken = [passes.get((kind, r)) for r in rows]
        times = [f"{t.wall_s * 1e3:.2f} / {t.cpu_s * 1e3:.2f}" if t else "–" for t in taken]
        body.append([_kind(kind), *times])
    c, eager_c = figures.results.costs().c, figures.results.costs(eager=True).c
    drift = ", ".join(f"{name} of {r}: {ratio:.2f}" for (name, r), ratio in sorted(figures.results.drift.items()))
    return f"""## Bare passes, ms

{table(["rows", *map(str, rows)], body)}

Wall / CPU time of the calling thread, medians. {SWEEPS} sweeps over all passes, of which each pass's middle one counts
(of `both at once` each tower's own). In the tower processes, without an engine: the states made, the tower run, the
head where an engine needs it at every position. `+ decision`: unmask, with the head at masked positions, or sample
(which is read on the host). `eager`: without capture.
`both at once`: the two towers at the same time, each on its core. `after a pause`: each after {1e3 * PAUSE_S:g} ms of
sleep. Denoiser step and commit are [rows,16], AR step [rows,1], prompts as asked; in all but prompts the sequences have
read {figures.questions.cached} tokens. c = {c:.2f} (eager {eager_c:.2f}).

The machine's drift, the same passes at the end of the run ÷ then: {drift}."""


def ceiling_section(figures: Figures) -> str:
    results, tokens = figures.results, figures.plan.max_new_tokens
    kinds = (results.costs(), results.costs(True), results.costs(True, both=True), results.costs(eager=True))
    body = []
    for square in figures.squares():
        variant, concurrency = square
        allowed = [results.ceiling(costs, square, tokens) for costs in kinds]
        bound, demand = allowed[0].bound, results.demands.get(variant)
        if variant.mode is Mode.DIFFUSION and concurrency > 1:
            bound += f" ({allowed[0].rows} rows a step, {allowed[0].commit_rows} a commit)"
        per_step = f"{demand.tokens_per_step:.2f}" if demand else "–"
        body.append([variant.name, str(concurrency), per_step, *(f"{one.tokens_per_s:.0f}" for one in allowed), bound])
    head = ["mode", "concurrency", "τ", "pass", "+ decision", "+ decision, both at once", "eager pass", "bound"]
    return f"""## Ceilings, tokens/s

Written down at {results.ceilings_at}, before any engine was timed; the table above divides by the column `pass`.

{table(head, body)}

At concurrency 1 a tower that waited for the other starts cold; such passes (+ decision) taken at their price after a
pause:

{_turns(figures)}

Diffusion ÷ AR at concurrency 1, 16/(c·(16/τ + 1)):

{_simple_ratios(figures)}

{_quoted(ceilings.__doc__ or "")}"""


def _turns(figures: Figures) -> str:
    results, lines = figures.results, []
    for variant, demand in results.demands.items():
        allowed = turns_ceiling(results.costs(True), results.costs(True, rested=True), demand)
        line = f"- {variant.name}: {allowed:.0f} tokens/s allowed"
        if runs := results.split.get((variant, 1)):
            line += f", {spread([r.run.steady_tokens_per_s / allowed for r in runs], 2)} of it got"
        lines.append(line)
    return "\n".join(lines)


def _simple_ratios(figures: Figures) -> str:
    results, lines = figures.results, []
    for variant, demand in results.demands.items():
        line = f"- {variant.name}: {simple_ratio(results.costs(), demand.tokens_per_step):.2f} allowed"
        diffusion, ar = results.split.get((variant, 1)), results.split.get((figures.ar, 1))
        if diffusion and ar:
            pairs = zip(diffusion, ar, strict=True)
            line += f", {spread([d.run.steady_tokens_per_s / a.run.steady_tokens_per_s for d, a in pairs], 2)} got"
        lines.append(line)
    return "\n".join(lines)


def throughput(figures: Figures) -> str:
    results, body = figures.results, []
    for square in figures.squares():
        runs = results.split[square]
        ratios = [figures.to_ceiling(square, *kind) for kind in ((False, False), (True, False), (True, True))]
        body.append(
            [
                square[0].name,
                str(square[1]),
                spread([loaded.run.tokens_per_s for loaded in runs], 0),
                spread([loaded.run.steady_tokens_per_s for loaded in runs], 0),
                *(spread(ratio, 2) for ratio in ratios),
                spread(figures.to_naive(square), 2),
                _cores_busy(runs),
                _same_steps(figures, square),
            ]
        )
    head = ["mode", "concurrency", "tokens/s", "steady", "÷ ceiling", "÷ ceiling + decision", "the same, both at once"]
    head += ["÷ naive", "denoiser / context / client cores", "steps as naive"]
    naive = "; ".join(
        f"{variant.name} {spread([m.tokens_per_second for m in runs], 0)}" for variant, runs in results.naive.items()
    )
    return f"""## Throughput, split pair

{table(head, body)}

`tokens/s` is of the whole run, `steady` while all clients were busy, which the ceilings assume. `cores`: CPU time of
each process over wall time. Naive loop, tokens/s at any concurrency: {naive}."""


def _cores_busy(runs: list[Loaded]) -> str:
    names = ("denoiser", "context", "client")
    return " / ".join(
        f"{statistics.median(r.cpu_s[name] / (r.run.ended - r.run.started) for r in runs):.2f}" for name in names
    )


def _same_steps(figures: Figures, square: Square) -> str:
    demand = figures.results.demands.get(square[0])
    if demand is None:
        return "–"
    taken = figures.results.split[square][0].run.mean_steps
    return "yes" if abs(taken - demand.steps) < 1e-6 else f"{taken:.2f}, naive {demand.steps:.2f}"


def parts_of_a_tick(figures: Figures) -> str:
    body = []
    for tower, square, ticks in figures.tick_rows():
        shares = (ticks.forward, ticks.decision, ticks.exchange, ticks.rest)
        numbers = [str(ticks.ticks), f"{ticks.rows:.1f}", f"{ticks.tick_s * 1e3:.2f}"]
        numbers += [f"{share:.1%}" for share in shares] + [f"{ticks.cpu:.2f}"]
        over_bare = figures.forward_to_bare(tower, square)
        numbers.append("–" if over_bare is None else f"{over_bare:.2f}")
        body.append([tower, square[0].name, str(square[1]), *numbers])
    head = ["tower", "mode", "concurrency", "ticks", "rows", "p50, ms", "forward", "decision", "exchange", "rest"]
    return f"""## Parts of a tick

{table([*head, "CPU ÷ wall", "forward ÷ bare"], body)}

Shares of the wall time of ticks that had work, recorders on. Forward: states, tower, head. Decision: unmask or sample,
without the reading on the host; a denoiser's forward and decision are one program, so its time is shared out as that of
bare passes with and without decision. Exchange: calls of link and port inside the tick, packing of deltas included. CPU
below wall: the thread waited for a core or for the interpreter. Forward ÷ bare: CPU time of a denoiser's steps, of
commits and AR steps over that of bare ones of as many rows, prompts left out; above 1, the engine found caches cold."""


def who_computes(figures: Figures) -> str:
    body = []
    for square, seen in figures.overlaps():
        shares = (seen.denoiser, seen.context, seen.neither, seen.exchange, seen.on_the_way, seen.delivery)
        cells = [f"{seen.rows:.1f}", f"{seen.active:.1f}", *(f"{share:.1%}" for share in shares), f"{seen.writing:.1%}"]
        for ms in crossings_ms(figures.results.watched[square].recordings).values():
            cells.append(f"{percentile(ms, 50):.2f} / {percentile(ms, 99):.2f}" if ms else "–")
        body.append([square[0].name, str(square[1]), *cells])
    head = ["mode", "concurrency", "rows per tick", "active", "denoiser ticks", "context ticks", "neither computes"]
    head += [
        "of it exchange",
        "of that no tick",
        "of it events",
        "deltas written",
        "commit on its way, ms",
        "at the context tower, ms",
        "delta until applied, ms",
    ]
    return f"""## Who computes when

{table(head, body)}

Shares of the time in which at least two sequences (one at concurrency 1) are known to the denoiser engine, from being
opened to being released. `neither computes`: no forward and no decision runs on either tower. `of it exchange`: the
part of that in which an engine sends, receives or packs, or the link's thread writes into the mirror, or no engine
does anything (no tick, no delivery of events), so that whatever is awaited is on its way. `of it events`: the part in
which events go out between ticks. `deltas written`: by the link's thread, whatever else went on: where a tower computes
meanwhile, what that takes from it shows as longer forwards. The last three columns follow every commit, p50 / p99;
waiting until the engine looks is counted in them, though others' work fills it."""


def latency(figures: Figures) -> str:
    body = []
    for number, run in enumerate(figures.results.mixed):
        gaps = [gap * 1e3 for gap in diffusion_gaps(run)]
        percentiles = [f"{percentile(gaps, percent):.2f}" for percent in (50, 95, 99, 100)]
        body.append([str(number + 1), str(len(gaps)), *percentiles])
    blocks = table(["round", "blocks", "p50", "p95", "p99", "max"], body)
    body = []
    for variant, seen in figures.results.long_prompts.items():
        cells = [_percentiles_ms(values) for values in (seen.before, seen.during, seen.chunks)]
        body.append([variant.name, *cells, f"{seen.first_token_s * 1e3:.0f}"])
    prompts = table(["running", "between steps before", "while it is read", "chunks", "its first tokens"], body)
    return f"""## Time between committed blocks ÷ steps, ms

{blocks}

As the client sees it; all modes mixed, answers of a quarter, a half and all of the tokens, arrivals at random.

## A {figures.plan.long_prompt}-token prompt arrives, ms

{prompts}

p50 / p99 / max; {figures.plan.running_beside} requests were running. Chunks: ticks of the context engine, all parts
of a chunk together."""


def _percentiles_ms(values: tuple[float, ...]) -> str:
    return " / ".join(f"{percentile(values, percent) * 1e3:.1f}" for percent in (50, 99, 100)) if values else "–"


def served(figures: Figures) -> str:
    results, body = figures.results, []
    for variant, runs in results.served.items():
        split = [loaded.run.tokens_per_s for loaded in results.split[variant, figures.plan.most]]
        through = [measured.tokens_per_second for measured in runs]
        local = [measured.tokens_per_second for measured in results.in_process[variant]]
        ratios = [spread(figures.to_in_process(variant), 2)]
        ratios.append(f"{statistics.median(through) / statistics.median(split):.2f}")
        body.append([variant.name, spread(local, 0), spread(split, 0), spread(through, 0), *ratios])
    if not body:
        return ""
    head = ["mode", "in process", "split pair without Ray", "served", "served ÷ in process", "served ÷ split pair"]
    return f"""## Served over gRPC at concurrency {figures.plan.most}, tokens/s

{table(head, body)}

In process: both towers on one thread of this process (`twotower.engine.in_process`), before and after each service.
Served: `python -m cluster up`, split placement. The split pair was measured earlier in this run.
{SERVED_TIMES} times the requests of other runs."""


def memory(figures: Figures) -> str:
    body = [
        [tower, f"{predicted.total / 2**20:.2f}", f"{allocated / 2**20:.2f}", str(predicted)]
        for tower, (predicted, allocated) in figures.results.memory.items()
    ]
    return f"""## Tensor bytes

{table(["tower", "predicted, MiB", "allocated, MiB", "what is predicted"], body)}

Allocated: every storage of every tensor that Python holds in the process after some answers, counted once."""


def profiles(figures: Figures) -> str:
    texts = []
    for name, taken in figures.results.profiles.items():
        if taken is None:
            texts.append(f"{name}: nothing, py-spy is missing or may not look.")
        else:
            lines = "\n".join(f"    {share:6.1%}  {place}" for place, share in taken.ours)
            texts.append(f"{name}, {taken.samples} samples of the engine's thread:\n\n{lines}")
    if not texts:
        return ""
    return "\n\n".join(
        [
            "## Profile",
            "By py-spy: samples by our innermost function, with what torch did for it. A recorded pass is one.",
            *texts,
        ]
    )


def _kind(kind: Kind) -> str:
    notes = [(kind.decide, " + decision"), (kind.eager, ", eager"), (kind.both, ", both at once")]
    notes.append((kind.rested, ", after a pause"))
    return kind.name + "".join(note for wanted, note in notes if wanted)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines())
