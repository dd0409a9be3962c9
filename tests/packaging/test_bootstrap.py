"""How .venv is made: which torch comes from where, when everything starts over, and what a failure says.

Nothing is installed here: `pip` and the questions to an interpreter are recorded.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bootstrap.py"


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, its environment in a directory of the test's."""
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    venv.mkdir()
    places = {
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "STAMP": venv / "bootstrap-stamp",
        "LOG": venv / "log",
    }
    for name, place in places.items():
        monkeypatch.setattr(module, name, place)
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    return module


class Pip:
    """Remembers what it was asked for; only what `has` allows succeeds."""

    def __init__(self, *has: str) -> None:
        self.has, self.asked = has, list[tuple[str, ...]]()

    def __call__(self, *arguments: str, wanted: str | None = None) -> bool:
        self.asked.append(arguments)
        return any(source in arguments for source in self.has)


def test_a_cpu_machine_takes_the_wheel_that_lies_in_pips_links(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip("--no-index")
    monkeypatch.setattr(bootstrap, "pip", pip)
    bootstrap.install_torch(has_gpu=False)
    assert pip.asked == [("--no-index", "--no-deps", bootstrap.TORCH)]


@pytest.mark.parametrize("named", [None, "https://wheels.example/cpu"])
def test_where_none_lies_there_it_asks_a_cpu_index(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    pip = Pip()
    monkeypatch.setattr(bootstrap, "pip", pip)
    if named is not None:
        monkeypatch.setenv("TORCH_INDEX_URL", named)
    bootstrap.install_torch(has_gpu=False)
    index = named or bootstrap.TORCH_CPU_INDEX
    assert pip.asked[1:] == [("--no-deps", "--index-url", index, bootstrap.TORCH)]
    assert index.endswith("/cpu")


def test_a_gpu_machine_never_takes_the_cpu_wheel(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip()
    monkeypatch.setattr(bootstrap, "pip", pip)
    monkeypatch.setattr(bootstrap, "torch_build", lambda: None)
    bootstrap.install_torch(has_gpu=True)
    assert pip.asked == [(f"{bootstrap.TORCH},!={bootstrap.TORCH_VERSION}+cpu",)]


def test_a_gpu_machine_keeps_its_owners_torch(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip()
    monkeypatch.setattr(bootstrap, "pip", pip)
    monkeypatch.setattr(bootstrap, "torch_build", lambda: ("2.11.0", "13.0"))
    bootstrap.install_torch(has_gpu=True)
    assert not pip.asked


@pytest.mark.parametrize(
    ("build", "has_gpu", "said"),
    [
        (("2.13.0+cpu", None), True, "an NVIDIA GPU, but torch 2.13.0+cpu is a CPU build"),
        (("2.13.0", "13.0"), False, "no NVIDIA GPU, but torch 2.13.0 is built for CUDA 13.0"),
        (None, False, "does not import"),
    ],
)
def test_the_wrong_torch_is_named(
    bootstrap: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    build: tuple[str, str | None] | None,
    has_gpu: bool,
    said: str,
) -> None:
    monkeypatch.setattr(bootstrap, "torch_build", lambda: build)
    with pytest.raises(bootstrap.BootstrapError, match=said.replace("+", r"\+")):
        bootstrap.check_torch(has_gpu)


@pytest.mark.parametrize(
    ("stamp", "starts", "over"),
    [
        ("digest {root}", True, False),  # finished, perhaps stale: mended in place
        ("", True, False),  # a later build was cut short: mended in place
        ("building", True, True),  # the first build was cut short
        ("digest /moved/from/here", True, True),  # scripts in bin/ name the old place
        ("digest {root}", False, True),  # its Python is gone
    ],
)
def test_it_starts_over_only_where_mending_cannot_help(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, stamp: str, starts: bool, over: bool
) -> None:
    monkeypatch.setattr(bootstrap, "runs", lambda *command: starts)
    if stamp:
        bootstrap.STAMP.write_text(stamp.format(root=bootstrap.ROOT))
    assert bootstrap.must_start_over() == over


def test_a_changed_recipe_makes_the_environment_stale(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("one")
    first = bootstrap.wanted_stamp()
    assert bootstrap.wanted_stamp() == first
    (tmp_path / "pyproject.toml").write_text("two")
    assert bootstrap.wanted_stamp() != first
    assert bootstrap.current_stamp() == ""


def test_what_pip_says_last_is_part_of_the_error(bootstrap: ModuleType) -> None:
    bootstrap.PYTHON.parent.mkdir()
    bootstrap.PYTHON.write_text("#!/bin/sh\necho \"asked: $*\"\necho 'no such release'\nexit 1\n")
    bootstrap.PYTHON.chmod(0o755)
    with pytest.raises(bootstrap.BootstrapError, match=r"could not install torch(?s:.*)no such release(?s:.*)log"):
        bootstrap.pip("torch", wanted="torch")
    assert not bootstrap.pip("torch")
    assert "asked: -m pip install" in bootstrap.LOG.read_text()
