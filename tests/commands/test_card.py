"""The demo's model card: its prompts get the answers that stand there, and readers are told of no others."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import twotower
from tests.commands.readme import README
from tests.commands.running import Run, json_lines, results_of
from twotower.commands.arguments import EXAMPLES

CARD = Path(twotower.__file__).parent / "demo" / "checkpoint" / "README.md"
MODES = ("diffusion", "ar")


def _answers() -> dict[str, str]:
    """The card's prompts, each with its line break, and the right answers."""
    rows = re.findall(r"^\| `(.+)` \| `(.+)` \|$", CARD.read_text(encoding="utf-8"), re.MULTILINE)
    return {f"{prompt}\n": answer.replace("⏎", "\n") for prompt, answer in rows}


def _told(text: str) -> set[str]:
    """Prompts in a text: --prompt $'…\\n', {"prompt": "…\\n"}, prompt="…\\n" and text="…\\n"."""
    found = re.findall(r"""--prompt \$'(.+?)\\n'|"prompt": "(.+?)\\n"|\b(?:prompt|text)="(.+?)\\n\"""", text)
    return {f"{''.join(spellings)}\n" for spellings in found}


def test_prompts_of_readme_and_help_stand_in_the_card() -> None:
    for text in (README, EXAMPLES):
        assert _told(text) and _told(text) <= _answers().keys()


@pytest.mark.slow
def test_the_cards_answers(tmp_path: Path, run: Callable[..., Run]) -> None:
    asked = [(prompt, mode) for prompt in _answers() for mode in MODES]
    assert len(asked) >= 2 * 6
    file = json_lines(
        tmp_path / "in", *({"prompt": prompt, "mode": mode, "max_new_tokens": 512} for prompt, mode in asked)
    )
    out = tmp_path / "out"
    assert run("--checkpoint", "demo", "--input", file, "--output", str(out)).code == 0
    wrong = []
    for (prompt, mode), result in zip(asked, results_of(out), strict=True):
        assert result["mode"] == mode
        if result["text"].strip() != _answers()[prompt] or result["finish_reason"] != "stop":
            wrong.append((prompt, mode))
    assert wrong == []
    assert "`ar` gets all of these right, `diffusion 0.8` gets all of these right." in CARD.read_text(encoding="utf-8")
