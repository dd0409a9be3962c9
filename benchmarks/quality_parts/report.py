"""The result as markdown: the trade of quality for throughput, what bounds it, and every figure behind it."""

import statistics
from dataclasses import asdict, dataclass

from benchmarks.quality_parts.plan import BLOCK, Plan
from benchmarks.quality_parts.record import Record, Spent
from benchmarks.reference.report import setup, spread
from twotower.core import Mode
from twotower.demo.families import LONG
from twotower.demo.scores import (
    AR,
    USUAL,
    VERIFIED,
    BlockSteps,
    Ratio,
    Score,
    Way,
    as_markdown,
    identical,
    mean_accuracy,
    retained,
    steps_by_block,
    tokens_per_step,
)

SHORT_OR_LONG = {False: "short", True: "long"}


@dataclass(frozen=True)
class Costs:
    """Seconds of bare passes at one row: a denoiser step over a block, an AR step, the commit of a block, a prompt. For
    prompts it is the mean of those timed."""

    denoise_s: float
    ar_s: float
    commit_s: float
    prompt_s: float

    @property
    def c(self) -> float:
        return self.denoise_s / self.ar_s

    def ceiling(self, per_step: float) -> float:
        """Diffusion over AR at concurrency 1 at most, with a commit as dear as a step."""
        return BLOCK / (self.c * (BLOCK / per_step + 1))

    def passes_s(self, spent: Spent) -> float:
        """The passes of such requests, one after the other. A prompt's gives `ar` its first token too; the head for it
        is left out."""
        steps_s = spent.num_steps * self.denoise_s + spent.num_commits * self.commit_s
        if not spent.num_steps:
            steps_s = (spent.num_tokens - spent.num_answers) * self.ar_s
        return spent.num_answers * self.prompt_s + steps_s


class Findings:
    """What follows from a record."""

    def __init__(self, plan: Plan, record: Record, costs: Costs | None) -> None:
        self.plan, self.record, self.costs = plan, record, costs

    def scores(self, way: Way, long: bool | None = None) -> list[Score]:
        """Of every family, or of those with long answers or the others."""
        families = self.plan.families if long is None else self.plan.group(long)
        return [self.record.scores[family, str(way)] for family in families]

    def kept(self, way: Way, long: bool | None = None) -> float:
        """Mean accuracy as a share of `ar`'s."""
        return mean_accuracy(self.scores(way, long)) / mean_accuracy(self.scores(AR, long))

    def timed_tokens_per_step(self, way: Way, long: bool) -> float:
        """Of the requests that were timed at concurrency 1."""
        runs = self.record.of(str(way), 1, long)
        return sum(run.num_tokens for run in runs) / max(1, sum(run.num_steps for run in runs))

    def times_ar(self, way: Way, concurrency: int, long: bool) -> list[float]:
        """Throughput over that of `ar`, round by round."""
        ours, theirs = (self.record.of(str(each), concurrency, long) for each in (way, AR))
        pairs = zip(ours, theirs, strict=True)
        return [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs]

    def task_times_ar(self, way: Way, family: str) -> list[float]:
        """The same of one task, at concurrency 1."""
        ours, theirs = (self.record.of(str(each), 1, family in LONG) for each in (way, AR))
        pairs = zip(ours, theirs, strict=True)
        return [ours.tasks[family].tokens_per_s / theirs.tasks[family].tokens_per_s for ours, theirs in pairs]

    @property
    def compared(self) -> list[Way]:
        """Beside `ar`, in the table of tasks."""
        return [way for way in (USUAL, VERIFIED) if way in self.plan.ways]

    @property
    def swept(self) -> list[Way]:
        """The thresholds, at the usual number of steps."""
        return [way for way in self.plan.ways if way.mode is Mode.DIFFUSION and way.steps_per_block == BLOCK]

    def slower_at(self, way: Way, long: bool) -> list[int]:
        """The concurrencies at which `ar` was the faster one, by the median."""
        return [c for c in self.plan.concurrency if statistics.median(self.times_ar(way, c, long)) < 1]


def render(findings: Findings, target: str, load_before: float, command: str) -> str:
    """The whole report."""
    parts = [
        "# Quality kept against throughput gained",
        setup(load_before, command),
        _method(findings, target),
        "## Throughput, times that of AR\n\n" + throughput(findings),
        "## By task\n\n" + by_task(findings) + "\n\n" + _of_the_timed(findings),
        "## By way of decoding\n\n" + _by_way(findings),
        "## Speed\n\n" + _speed(findings),
        _whose_time(findings),
        _blocks(findings),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def throughput(findings: Findings) -> str:
    """What is kept and gained, a row for each way and length of answers."""
    clients = [f"at {concurrency}" for concurrency in findings.plan.concurrency]
    head = ["answers", "way", "retained", "identical to AR's", "tokens a step or round", *clients]
    rows = [head, ["---"] * len(head)]
    for long in findings.plan.lengths:
        for way in findings.compared:
            scores = findings.scores(way, long)
            cells = [SHORT_OR_LONG[long], str(way), *_against_ar(findings, way, long), f"{tokens_per_step(scores):.2f}"]
            times = [spread(findings.times_ar(way, c, long), 2) for c in findings.plan.concurrency]
            rows.append([*cells, *times])
    return as_markdown(rows)


def _against_ar(findings: Findings, way: Way, long: bool | None) -> list[str]:
    """What is kept of `ar`'s quality, and the share of answers that are its own."""
    same = identical(findings.scores(way, long), findings.scores(AR, long))
    return [_percent(findings.kept(way, long)), _percent(same)]


def by_task(findings: Findings) -> str:
    """Tasks down, those with short answers first; `ar` beside diffusion at the usual threshold and `verified`."""
    head = ["task", "tokens an answer", "AR"]
    for way in findings.compared:
        unit = "tokens a round" if way.mode is Mode.VERIFIED else "tokens a step"
        head += [str(way), "identical", unit, "× AR at 1"]
    rows = [head, ["---"] * len(head)]
    for long in findings.plan.lengths:
        rows += [_task(findings, family) for family in findings.plan.group(long)]
        rows.append(_of_all_tasks(findings, f"**{SHORT_OR_LONG[long]}**", long))
    return as_markdown([*rows, _of_all_tasks(findings, "**mean**", None)])


def _task(findings: Findings, family: str) -> list[str]:
    [ar] = [score for score in findings.scores(AR) if score.family == family]
    timed = findings.record.of(str(AR), 1, family in LONG)[0].tasks[family]
    cells = [family, f"{timed.num_tokens / timed.num_answers:.0f}", _percent(ar.accuracy)]
    for way in findings.compared:
        [score] = [score for score in findings.scores(way) if score.family == family]
        same, per_step = identical([score], [ar]), tokens_per_step([score])
        times = spread(findings.task_times_ar(way, family), 2)
        cells += [_percent(score.accuracy), _percent(same), f"{per_step:.2f}", times]
    return cells


def _of_all_tasks(findings: Findings, name: str, long: bool | None) -> list[str]:
    cells = [name, "", _percent(mean_accuracy(findings.scores(AR, long)))]
    for way in findings.compared:
        scores = findings.scores(way, long)
        times = "" if long is None else spread(findings.times_ar(way, 1, long), 2)
        same = identical(scores, findings.scores(AR, long))
        cells += [_percent(mean_accuracy(scores)), _percent(same), f"{tokens_per_step(scores):.2f}", times]
    return cells


def _of_the_timed(findings: Findings) -> str:
    plan = findings.plan
    return (
        f"Tokens an answer (`ar`'s) and × AR are of the {plan.sample_per_family} prompts a task that were timed in "
        f"each of {plan.rounds} rounds, all else of those that were marked."
    )


def _method(findings: Findings, target: str) -> str:
    plan = findings.plan
    resumed = " Measured in several runs (--resume)." if findings.record.resumed else ""
    return (
        f"Target: {target}.{resumed} Quality: {plan.per_family} held-out instances a family, a quarter of them of "
        "those with long answers, exact match, "
        f"temperature 0, blocks of 16, one pass at concurrency 16. Speed: {plan.sample_per_family} other instances a "
        f"family in turn, the same for every way, closed-loop clients, {plan.rounds} rounds whose order alternates; "
        "tokens up to eos. "
        "Brackets behind a ratio of qualities: 95 % paired bootstrap, its lower end no higher than what so many "
        "answers can show; behind a speed: smallest and largest round."
    )


def _by_way(findings: Findings) -> str:
    head = ["way", "mean accuracy", "retained, ratio of means", "retained, mean of ratios", "identical to AR's"]
    head += ["tokens per step", "answers", "× AR at 1", "τ of the timed", "ceiling", "of the ceiling"]
    rows = [head, ["---"] * len(head)]
    for way in findings.plan.ways:
        scores, per_step = findings.scores(way), tokens_per_step(findings.scores(way))
        kept = retained(scores, findings.scores(AR))
        cells = [str(way), _percent(mean_accuracy(scores)), _ratio(kept.of_means), _ratio(kept.mean_of_ratios)]
        cells += [_percent(identical(scores, findings.scores(AR))), f"{per_step:.2f}"]
        for long in findings.plan.lengths:
            rows.append([*cells, SHORT_OR_LONG[long], *_against_ceiling(findings, way, long)])
            cells = [""] * len(cells)
    said = as_markdown(rows)
    if findings.costs is not None:
        said += "\n\n" + _costs(findings.costs)
    return said


def _against_ceiling(findings: Findings, way: Way, long: bool) -> list[str]:
    if way not in findings.plan.speed_ways(1):
        return ["", "", "", ""]
    times = statistics.median(findings.times_ar(way, 1, long))
    if findings.costs is None or way.mode is not Mode.DIFFUSION:
        return [f"{times:.2f}", "", "", ""]
    per_step = findings.timed_tokens_per_step(way, long)
    ceiling = findings.costs.ceiling(per_step)
    return [f"{times:.2f}", f"{per_step:.2f}", f"{ceiling:.2f}", _percent(times / ceiling)]


def _costs(costs: Costs) -> str:
    return (
        f"Bare passes of this checkpoint on this machine, one thread, captured: a denoiser step over a block "
        f"{1e3 * costs.denoise_s:.2f} ms, an AR step {1e3 * costs.ar_s:.2f} ms, so c = {costs.c:.2f}. "
        "The ceiling of diffusion over AR at concurrency 1 is 16/(c·(16/τ + 1)), τ being the tokens per step "
        "of the very requests that were timed."
    )


def _speed(findings: Findings) -> str:
    head = ["answers", "concurrency", "way", "tokens/s", "× AR", "first token, ms"]
    rows, said = [head, ["---"] * len(head)], []
    for long in findings.plan.lengths:
        for concurrency in findings.plan.concurrency:
            for way in findings.plan.speed_ways(concurrency):
                runs = findings.record.of(str(way), concurrency, long)
                first = [1e3 * run.first_token_s for run in runs]
                speeds = spread([run.tokens_per_s for run in runs], 0)
                ratio = spread(findings.times_ar(way, concurrency, long), 2)
                rows.append([SHORT_OR_LONG[long], str(concurrency), str(way), speeds, ratio, spread(first)])
        slower = findings.slower_at(USUAL, long)
        where = f"concurrency {', '.join(map(str, slower))}" if slower else "no concurrency measured"
        said.append(f"With {SHORT_OR_LONG[long]} answers `ar` is faster than {USUAL} at {where} (medians).")
    return as_markdown(rows) + "\n\n" + " ".join(said)


def _whose_time(findings: Findings) -> str:
    """What of an answer's time is passes, and what diffusion would be over `ar` if that were all."""
    costs = findings.costs
    if costs is None:
        return ""
    head = ["answers", "way", "an answer, ms", "passes alone", "all else", "× AR", "by passes alone", "of that"]
    rows, alone = [head, ["---"] * len(head)], {}
    for long in findings.plan.lengths:
        for way in findings.plan.few_ways():
            spent = [run.spent for run in findings.record.of(str(way), 1, long)]
            took = [1e3 * each.seconds / each.num_answers for each in spent]
            passes = 1e3 * statistics.median(costs.passes_s(each) / each.num_answers for each in spent)
            tokens = statistics.median(each.num_tokens / each.num_answers for each in spent)
            alone[way] = tokens / passes
            times, bound = statistics.median(findings.times_ar(way, 1, long)), alone[way] / alone[AR]
            rest = statistics.median(took) - passes
            cells = [SHORT_OR_LONG[long], str(way), spread(took), f"{passes:.1f}", f"{rest:.1f}", f"{times:.2f}"]
            rows.append([*cells, f"{bound:.2f}", _percent(times / bound)])
    return (
        "## Where an answer's time goes, concurrency 1\n\n"
        + as_markdown(rows)
        + f"\n\nPasses alone: a prompt ({1e3 * costs.prompt_s:.2f} ms on average), then steps, and "
        f"commits ({1e3 * costs.commit_s:.2f} ms) of blocks that another one follows, or reads of drafts; × AR by "
        "them is what these weights on this machine come to where passes, one after the other, are all that takes "
        "time. All else: client, service, exchange, and what an engine does beside its passes."
    )


def _blocks(findings: Findings) -> str:
    if not blocks_are_known(findings):
        return ""
    by_family = {family: blocks_of(findings, family, USUAL) for family in findings.plan.families}
    most = max(map(len, by_family.values()))
    rows = [["task", *(f"block {i + 1}" for i in range(most))], ["---"] * (1 + most)]
    for family, blocks in by_family.items():
        rows.append([family, *(f"{b.mean_steps:.2f} × {b.num_blocks}" for b in blocks), *[""] * (most - len(blocks))])
    said = "Mean steps × number of such blocks; a wrong answer may run on to a further block. Other ways: in the JSON."
    return f"## Steps per block, {USUAL}\n\n{said}\n\n" + as_markdown(rows)


def blocks_are_known(findings: Findings) -> bool:
    """Over HTTP nobody tells the steps of a block, only those of an answer."""
    longest = max(len(blocks_of(findings, family, USUAL)) for family in findings.plan.families)
    return longest > 1


def blocks_of(findings: Findings, family: str, way: Way) -> list[BlockSteps]:
    """A family's first blocks, second blocks, …"""
    return steps_by_block([findings.record.scores[family, str(way)]])


def summary(findings: Findings) -> dict[str, object]:
    """The figures as JSON."""
    return {
        "prompts": sum(len(score.answers) for score in findings.scores(AR)),
        "costs": None if findings.costs is None else {"c": findings.costs.c, **vars(findings.costs)},
        "quality": [_quality(findings, way) for way in findings.plan.ways],
        "speed": [{**asdict(run), "tokens_per_s": run.tokens_per_s} for run in findings.record.runs.values()],
        "families": {
            family: {str(way): _of_family(findings, family, way) for way in findings.plan.ways}
            for family in findings.plan.families
        },
    }


def _of_family(findings: Findings, family: str, way: Way) -> dict[str, object]:
    score = findings.record.scores[family, str(way)]
    figures: dict[str, object] = {"accuracy": score.accuracy, "tokens_per_step": tokens_per_step([score])}
    if way.mode is Mode.DIFFUSION and blocks_are_known(findings):
        figures["blocks"] = [block._asdict() for block in steps_by_block([score])]
    return figures


def _quality(findings: Findings, way: Way) -> dict[str, object]:
    scores = findings.scores(way)
    kept = retained(scores, findings.scores(AR))
    return {
        "way": str(way),
        "mean_accuracy": mean_accuracy(scores),
        "retained_ratio_of_means": kept.of_means._asdict(),
        "retained_mean_of_ratios": kept.mean_of_ratios._asdict(),
        "identical": identical(scores, findings.scores(AR)),
        "tokens_per_step": tokens_per_step(scores),
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _ratio(ratio: Ratio) -> str:
    return f"{100 * ratio.value:.1f} % ({100 * ratio.low:.1f}–{100 * ratio.high:.1f})"
