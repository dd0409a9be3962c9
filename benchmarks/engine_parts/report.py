"""The result as markdown: where it ran, the table of targets, then what lies behind every line of it."""

from benchmarks.engine_parts import sections
from benchmarks.engine_parts.experiment import Experiment
from benchmarks.engine_parts.figures import Figures
from benchmarks.engine_parts.table import main_table
from benchmarks.reference.report import bullets, setup


def render(experiment: Experiment, command: str) -> str:
    """The whole report."""
    figures = Figures(experiment)
    parts = [
        "# Engines: what bare passes allow, and what is reached",
        setup(experiment.load_before, command),
        _configuration(figures),
        main_table(figures),
        sections.bare_passes(figures),
        sections.ceiling_section(figures),
        sections.throughput(figures),
        sections.parts_of_a_tick(figures),
        sections.who_computes(figures),
        sections.latency(figures),
        sections.served(figures),
        sections.memory(figures),
        sections.profiles(figures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _configuration(figures: Figures) -> str:
    plan, questions = figures.plan, figures.questions
    counts = ", ".join(f"{plan.requests_at(c)} at {c}" for c in plan.concurrency)
    lines = {
        "checkpoint": f"{plan.name} (`{plan.checkpoint.config.hybrid_override_pattern}`, float32)",
        "placement": f"split: two tower processes as a cell's but without Ray, {plan.threads} compute thread(s) each, "
        "gloo; the clients in a third process",
        "passes": f"capture `{plan.capture}`, prepared at start",
        "prompts": f"{questions.where_from}; {plan.prompts} of them in turn, median {questions.median_prompt} tokens",
        "decoding": f"greedy, {plan.max_new_tokens} new tokens, EOS ignored, block 16, 16 steps per block",
        "requests of a run": f"{counts}; {plan.rounds} rounds",
        "spread": "median (smallest–largest) over rounds",
    }
    return "## Configuration\n\n" + bullets(lines)
