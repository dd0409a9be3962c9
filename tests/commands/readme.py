"""README.md as a reader uses it: the commands and programs in its fences, and the output that stands below them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ANYTHING = "…"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A line that a reader types, and the lines shown below it."""

    line: str
    shown: str

    def __str__(self) -> str:
        return self.line


def fences(language: str | None = None) -> list[tuple[str, str]]:
    """(language, text) of every fence, or of those in this language."""
    return [(name, text) for name, text in _FENCE.findall(README) if language in (None, name)]


def commands() -> list[Command]:
    parts = [part for _, text in fences("console") for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]
    return [Command(line, shown) for line, _, shown in (part.partition("\n") for part in parts)]


def command(beginning: str) -> Command:
    """The only command that begins so."""
    [found] = [command for command in commands() if command.line.startswith(beginning)]
    return found


def programs() -> list[str]:
    return [text for _, text in fences("python")]


def printed(program: str) -> list[str]:
    """What a program prints, as it says behind each of its `print(…)`."""
    return re.findall(r"^\s*print\(.*\)  # (.+)$", program, re.MULTILINE)


def outside_fences() -> str:
    return _FENCE.sub("", README)


def matches(shown: str, real: str) -> bool:
    """Whether an output is the one that stands in the README, where `…` stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, shown.split(ANYTHING))), real, re.DOTALL) is not None


def shape(text: str) -> str:
    """Without what differs from machine to machine and from run to run: numbers, versions and paths."""
    return re.sub(r" *\d+(\.\d+)*", " #", re.sub(r"(?<=\()/[^)]+", "/PATH", text))
