"""What the README and the model card tell a reader to ask of the demo checkpoint gets the answers that stand there."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import twotower
from tests.commands.running import Run, json_lines, results_of
from twotower.commands.arguments import EXAMPLES

ROOT = Path(twotower.__file__).parents[1]
CARD = Path(twotower.__file__).parent / "demo" / "checkpoint" / "README.md"
MODES = ("diffusion", "ar")


def _readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def _answers() -> dict[str, str]:
    """The card's prompts, each with its line break, and the right answers."""
    rows = re.findall(r"^\| `(.+)` \| `(.+)` \|$", CARD.read_text(encoding="utf-8"), re.MULTILINE)
    return {f"{prompt}\n": answer.replace("⏎", "\n") for prompt, answer in rows}


def _told(text: str) -> set[str]:
    """Prompts of the commands in a text: --prompt $'…\\n' and {"prompt": "…\\n"}."""
    found = re.findall(r"""--prompt \$'(.+?)\\n'|"prompt": "(.+?)\\n\"""", text)
    return {f"{flag or field}\n" for flag, field in found}


def test_prompts_of_readme_and_help_stand_in_the_card() -> None:
    told = _told(_readme())
    assert len(told) >= 4 and told <= _answers().keys()
    assert _told(EXAMPLES) and _told(EXAMPLES) <= _answers().keys()


def test_the_cards_answers(tmp_path: Path, run: Callable[..., Run]) -> None:
    asked = [(prompt, mode) for prompt in _answers() for mode in MODES]
    assert len(asked) >= 2 * 6
    file = json_lines(tmp_path / "in", *({"prompt": prompt, "mode": mode} for prompt, mode in asked))
    out = tmp_path / "out"
    assert run("--checkpoint", "demo", "--input", file, "--output", str(out)).code == 0
    wrong = []
    for (prompt, mode), result in zip(asked, results_of(out), strict=True):
        assert result["mode"] == mode
        if result["text"].strip() != _answers()[prompt] or result["finish_reason"] != "stop":
            wrong.append((prompt, mode))
    # The card's examples are not picked: diffusion gets 93 % of sums right, and this one wrong, as the card says.
    assert wrong == [("add: 7789 5995\n", "diffusion")]
    assert not {prompt for prompt, _ in wrong} & (_told(_readme()) | _told(EXAMPLES))


@pytest.mark.parametrize("mode", MODES)
def test_the_readmes_own_command(mode: str, run: Callable[..., Run]) -> None:
    [prompt] = re.findall(r"-m twotower generate --checkpoint demo --prompt \$'(.+)\\n'$", _readme(), re.MULTILINE)
    done = run("--checkpoint", "demo", "--prompt", f"{prompt}\n", "--mode", mode)
    assert done.code == 0 and done.out == _answers()[f"{prompt}\n"] + "\n"
