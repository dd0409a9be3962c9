"""Documents cite what the repository holds: links lead somewhere, and nobody refers to what only its authors saw."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    ".ci",
    "actors",
    "benchmarks",
    "cluster",
    "deploy",
    "docs",
    "protos",
    "scripts",
    "tests",
    "twotower",
    "twotower_client",
)
SUFFIXES = {".md", ".proto", ".py", ".sh", ".toml", ".yaml"}
NAMES = {"Dockerfile", "Makefile", "run"}
GENERATED = "twotower/pb/"
# Commands in results name the files they wrote, under whatever name they have now.
RECORDS = "benchmarks/results/"
CITED = re.compile(
    r"(?<![\w/])(?:docs|benchmarks|deploy|twotower|cluster|actors|tests)/[\w/.-]+\.(?:md|yaml|proto|png)\b"
)
PRIVATE = re.compile(
    r"\bissues? \d|\bissue's\b|\bdesign\.md|\bstyle\.md|\bfaults\.md|semantics(\.md)? §|shared/\w", re.IGNORECASE
)
# KubeRay's schema is not ours to ship: these look for it beside the checkout, or where KUBERAY_CRD_DIR says.
SCHEMA = {".ci/run", "tests/deploy/crd.py"}


def texts() -> Iterator[tuple[str, str]]:
    """(path, text) of every file that a person reads."""
    paths = [*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    for path in sorted(paths):  # two workers must collect the same tests in the same order
        name = path.relative_to(ROOT).as_posix()
        if (path.suffix in SUFFIXES or path.name in NAMES) and path.is_file() and not name.startswith(GENERATED):
            yield name, path.read_text(encoding="utf-8")


DOCUMENTS = [(name, text) for name, text in texts() if name.endswith(".md")]


@pytest.mark.parametrize(("name", "text"), DOCUMENTS, ids=[name for name, _ in DOCUMENTS])
def test_links(name: str, text: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [t for t in targets if "://" not in t and not (ROOT / name).parent.joinpath(t).exists()]
    assert not missing


def test_each_bound_names_the_test_at_its_edge() -> None:
    rows = re.findall(r"^\|.*\|$", (ROOT / "docs" / "limits.md").read_text(encoding="utf-8"), re.MULTILINE)[2:]
    named = [(row, re.findall(r"`([\w/]+\.py)::(\w+)`", row)) for row in rows]
    assert len(rows) > 40 and not [row for row, tests in named if not tests]
    for _, tests in named:
        for path, test in tests:
            assert f"def {test}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), (path, test)


def test_cited_files_exist() -> None:
    cited = {(name, file) for name, text in texts() if not name.startswith(RECORDS) for file in CITED.findall(text)}
    assert len(cited) > 10
    assert not {(name, file) for name, file in cited if not (ROOT / file).exists()}


def test_nothing_cites_what_the_repository_does_not_hold() -> None:
    mine = Path(__file__).relative_to(ROOT).as_posix()
    found = [
        f"{name}: {match.group()}"
        for name, text in texts()
        if name != mine
        for match in PRIVATE.finditer(text)
        if not (name in SCHEMA and match.group().startswith("shared/"))
    ]
    assert not found
