"""Two tasks for lm-eval from the demo's held-out prompts, its command line, and what it wrote.

lm-eval tokenizes by itself here, with the checkpoint's tokenizer. The service takes its ids as they are, so lm-eval has
to put the BOS in front (`add_bos_token`).
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from twotower.demo.corpus import Instance

_CHOICE = """\
task: demo_choice
dataset_path: json
dataset_kwargs: {data_files: {test: CHOICES}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
_GENERATION = """\
task: demo_generation
dataset_path: json
dataset_kwargs: {data_files: {test: PROMPTS}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 48, temperature: 0}
metric_list: [{metric: exact_match}]
"""


def write(directory: Path, choices: Sequence[Instance], prompts: Sequence[Instance]) -> None:
    """The tasks and their data. A choice has the right answer and those of three others."""
    draw = Random(0)
    rows = []
    for instance in choices:
        # A beginning of the right answer would be likelier than all of it.
        others = [other.answer for other in choices if not instance.answer.startswith(other.answer)]
        wrong = draw.sample(others, 3)
        label = draw.randrange(4)
        rows.append(
            {"prompt": instance.prompt, "choices": [*wrong[:label], instance.answer, *wrong[label:]], "label": label}
        )
    _write_lines(directory / "choices.jsonl", rows)
    _write_lines(directory / "prompts.jsonl", [{"prompt": i.prompt, "answer": i.answer} for i in prompts])
    tasks = directory / "tasks"
    tasks.mkdir()
    (tasks / "choice.yaml").write_text(_CHOICE.replace("CHOICES", str(directory / "choices.jsonl")))
    (tasks / "generation.yaml").write_text(_GENERATION.replace("PROMPTS", str(directory / "prompts.jsonl")))


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(directory: Path, url: str, checkpoint: Path) -> list[str]:
    """What docs/api.md shows, for these tasks."""
    model = {
        "model": "demo",
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(checkpoint),
        "add_bos_token": "True",
        "num_concurrent": "8",
    }
    return [
        "--model=local-completions",
        f"--model_args={','.join(f'{name}={value}' for name, value in model.items())}",
        "--tasks=demo_choice,demo_generation",
        f"--include_path={directory / 'tasks'}",
        f"--output_path={directory / 'out'}",
        "--log_samples",
    ]


def results(directory: Path) -> dict[str, dict[str, float]]:
    [path] = (directory / "out").rglob("results_*.json")
    found: dict[str, dict[str, float]] = json.loads(path.read_text())["results"]
    return found


def likelihoods(directory: Path, checkpoint: Path) -> Iterator[tuple[list[int], int, float, bool]]:
    """Of each choice: prompt and continuation as lm-eval tokenized them, where the continuation begins, and what
    lm-eval found. It counts blanks at a prompt's end, and so the line break, as the continuation's."""
    from transformers import AutoTokenizer  # a second, which whoever collects tests would spend too

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    [path] = (directory / "out").rglob("samples_demo_choice_*.jsonl")
    for line in path.read_text().splitlines():
        sample = json.loads(line)
        for number, answered in enumerate(sample["filtered_resps"]):
            prompt, continuation = sample["arguments"][f"gen_args_{number}"].values()
            token_ids, start = tokenizer(prompt + continuation).input_ids, len(tokenizer(prompt.rstrip()).input_ids)
            yield token_ids, start, float(answered[0]), str(answered[1]) == "True"
