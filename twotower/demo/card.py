"""The model card beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from twotower.demo.corpus import Instance, stream
from twotower.demo.families import FAMILIES
from twotower.demo.recipe import STAGES, StageRecipe
from twotower.demo.scores import AR, USUAL, Score, Way, of_way, retained, table
from twotower.demo.trainer import Trainer, versions

EARLIER = {
    "9d5b2cb319fd16a592190f3ac62c0548450806cd8e1243be80aa626c2049aaef": "which commit 209a853 of this repository holds",
    "61d0a211aba5ac0c59a66730cb8ffeebda8cf7f49a056f07fe3b3f853875c092": (
        "which commit b5a6ad2 trains from the others, with `--threads 2` and `--train-steps 900 2600`"
    ),
    "2b29cea3b96b06d46137e216d6cf0d967bf37c69314961304a791f349f0ee7f9": (
        "which commit 4513ce3 holds in `benchmarks/results/demo_candidate_2026-11-30`; "
        "`benchmarks/results/demo_training_log_2026-11-30.md` says how they were made"
    ),
}
"""Where to find weights that are not in this commit, by their sha256."""

_CARD = """# TwoTower demo checkpoint

A small two-tower diffusion language model (`NemotronHTwoTowerForCausalLM`) in the released file layout, for trying and
testing everything without a GPU. `twotower/demo/` trained it{begun} on text that `twotower/demo/families/` makes. It
knows these {num_families} families of tasks and nothing else.

{shape}.
Ids 0 pad, 1 bos, 2 eos, 3 mask. The weights are stored in bf16 (small vectors in fp32), and meant to be served in
float32.

## Prompts

Every prompt is one line and ends with a line break. Without the line break the model writes it first.

| prompt | right answer |
|---|---|
{examples}

{missed}

The model also knows `date:`, `iso:` and `us:` for the other formats of dates. For records it knows `csv:`, and JSON or
CSV as the given form; for tables, `rows pairs:`. Names, things, cities and so on come from short lists (`families/`).

## Scores

Exact match on {num_instances} held-out instances per family, with block 16, 16 steps and temperature 0; `diffusion γ`.
No test prompt was trained on: the split is a hash of the prompt. But the numbers of most held-out `words` and `number`
prompts were trained on in the other direction. Tokens per step count up to eos, without the rest of the last block.

{scores}

Quality kept by diffusion at γ 0.8 against `ar`: {kept}.
`benchmarks/quality.py` measures other thresholds.

## Recipe

`{command}` (seed {seed}; {versions}).
{earlier}
- Context stage: {context};
  next-token loss on answers (and the line break before) only.
- Denoiser stage: starts as {start}. The context tower is frozen and seeds each block with its states.
  {denoiser}; two masks per block.
  Every {mock_ar_every}th train step adds mock-AR's own objective on as many single tokens as instances.
  The loss is the mean cross-entropy over masked positions. Blocks start where the prompt ends (for every fourth
  instance before its line break). A block has 1 to 16 masked positions, all counts equally likely; a further
  {full_mask_share:.0%} of the blocks are fully masked.
  {suffix_share:.0%} of the masks hide the block's end, the others random positions. A
  block's second mask leaves masked what the denoiser itself would still have masked some steps after the first. The
  conditioning t is exactly masked / 16, as in serving.
- The denoiser's logits are divided by {temperature:g} (temperature scaling, folded into its final norm). Predictions
  stay the same and confidences fall, so that γ 0.8 keeps its quality. The divisor was chosen on training prompts.
- Optimisers: Muon for the hidden matrices (weight decay {weight_decay:g}), Adam for the rest (gradient norm 1). The
  learning rate warms up, stays constant, and decays linearly over the last part. The experts' correction bias keeps
  them balanced.

{minutes} Loss at every hundredth train step: `training_log.jsonl`.

## Limits

Other prompts than those above give nonsense. Numbers reach 9999 (roman 3999), years go from 1900 to 2099, days from 1
to 28. Records have two to four fields; a description has up to four facts and a name. Lists have up to seven words or
six numbers. Numbers to add have up to four digits, word problems stay below 100, and functions have up to three steps.
Tables and prose have five to eight rows or people, always the first of the alphabetical list of names. `steps` has four
to eight calculations, named a to h. Modules have four to seven one-step functions, named f g h k m p t in this order.

## Licence

Apache-2.0, like the project, which made the weights and their training text. These weights contain nothing of the
released checkpoint; only the architecture is the same.
"""


def model_card(
    trainer: Trainer,
    scores: list[Score],
    missed: Mapping[Way, list[Instance]],
    full_mask_share: float,
    suffix_share: float,
) -> str:
    """The card of this run, with the scores of the files beside it and the examples that they miss."""
    recipe = trainer.recipe
    return _CARD.format(
        num_families=len(FAMILIES),
        shape=_shape(trainer),
        examples="\n".join(map(_row, examples())),
        missed=f"{_missed(AR, missed)}, {_missed(USUAL, missed)}.",
        num_instances=len(scores[0].answers),
        scores=table(scores),
        kept=_kept(scores),
        command=command(trainer),
        begun=" further, from earlier revisions," if recipe.begun_from else " from nothing",
        earlier=_earlier(recipe.begun_from),
        start="the mean of the earlier ones" if recipe.begun_from else "a copy of the context tower",
        seed=recipe.seed,
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
        context=_stage(recipe.context),
        denoiser=_stage(recipe.denoiser),
        mock_ar_every=recipe.mock_ar_every,
        temperature=recipe.confidence_temperature,
        minutes=_minutes(trainer),
        full_mask_share=full_mask_share,
        suffix_share=suffix_share,
        weight_decay=recipe.weight_decay,
    )


def command(trainer: Trainer) -> str:
    """The command that trains this checkpoint again."""
    recipe = trainer.recipe
    return (
        f"python -m twotower.demo train {_from(recipe.begun_from)}--output DIR --seed {recipe.seed} "
        f"--train-steps {recipe.context.train_steps} {recipe.denoiser.train_steps}"
    )


def _from(begun_from: tuple[str, ...]) -> str:
    return f"--from {' '.join(map(_name, begun_from))} " if begun_from else ""


def _name(sha256: str) -> str:
    """A name for a directory with these weights, for the command."""
    return f"EARLIER-{sha256[:6]}"


def _earlier(begun_from: tuple[str, ...]) -> str:
    """What the run began from, and where it is."""
    if not begun_from:
        return ""
    weights = "; ".join(
        f"{_name(sha256)} has the weights of sha256 `{sha256}`" + (f", {EARLIER[sha256]}" if sha256 in EARLIER else "")
        for sha256 in dict.fromkeys(begun_from)
    )
    return (
        "\nBoth towers begin as the mean of these earlier weights; weights that are named twice count twice. "
        f"{weights}.\n"
    )


def _shape(trainer: Trainer) -> str:
    config = trainer.context.config
    millions = sum(p.numel() for p in trainer.context.parameters()) / 1e6
    return (
        f"{config.num_layers} layers `{config.hybrid_override_pattern}`, width {config.hidden_size}, "
        f"{millions:.1f} M parameters a tower, {config.n_routed_experts} experts of which {config.num_experts_per_tok} "
        f"and a shared one are used,\nbyte-level BPE of {config.vocab_size} tokens, no positional encoding"
    )


def examples() -> list[Instance]:
    """The card's examples, one a family: drawn, not picked, and never among the scored instances."""
    return [next(islice(stream("test", "card", family), 1, None)) for family in FAMILIES]


def _row(instance: Instance) -> str:
    answer = instance.answer.replace("\n", "⏎")
    return f"| `{instance.prompt.strip()}` | `{answer}` |"


def _missed(way: Way, missed: Mapping[Way, list[Instance]]) -> str:
    prompts = ", ".join(f"`{instance.prompt.strip()}`" for instance in missed[way])
    return f"`{way}` gets all of these right" + (f" but {prompts}" if prompts else "")


def _kept(scores: list[Score]) -> str:
    kept = retained(of_way(scores, USUAL), of_way(scores, AR)).of_means
    return f"{100 * kept.value:.1f} % ({100 * kept.low:.1f} to {100 * kept.high:.1f}, 95 % bootstrap interval)"


def _minutes(trainer: Trainer) -> str:
    spent = {stage: sum(e.seconds for e in trainer.history if e.stage == stage) / 60 for stage in STAGES}
    return "Minutes: " + ", ".join(f"{stage} stage {minutes:.0f}" for stage, minutes in spent.items()) + "."


def _stage(recipe: StageRecipe) -> str:
    rates = f"learning rates {recipe.muon_rate:g} (Muon) and {recipe.adam_rate:g} (Adam)"
    return f"{recipe.train_steps} train steps of {recipe.batch_size} instances, {rates}"
