"""How .venv and .venv-kernels are made: which torch comes from where, when all starts over, what a failure says.

Nothing is installed here: `pip` and the questions to an interpreter are recorded.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """They import one another by their file names, as when one of them is run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    yield
    for path in SCRIPTS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def environment(scripts: None) -> ModuleType:
    return importlib.import_module("environment")


@pytest.fixture
def bootstrap(scripts: None) -> ModuleType:
    return importlib.import_module("bootstrap")


@pytest.fixture
def kernels_env(scripts: None) -> ModuleType:
    return importlib.import_module("kernels_env")


@pytest.fixture
def env(environment: ModuleType, tmp_path: Path) -> Any:
    """An environment in a directory of the test's."""
    venv, recipe = tmp_path / ".venv", tmp_path / "recipe"
    venv.mkdir()
    recipe.write_text("one")
    return environment.Environment(venv, (recipe,))


class Pip:
    """Remembers what it was asked for; only what `has` allows succeeds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, environment: ModuleType, *has: str) -> None:
        self.has, self.asked, self.settings = has, list[tuple[str, ...]](), list[dict[str, str] | None]()
        asked = lambda env, *arguments, **more: self(*arguments, **more)  # noqa: E731  # a method takes its object
        monkeypatch.setattr(environment.Environment, "pip", asked)

    def __call__(self, *arguments: str, wanted: str | None = None, settings: dict[str, str] | None = None) -> bool:
        self.asked.append(arguments)
        self.settings.append(settings)
        return any(source in arguments for source in self.has)


def test_a_cpu_machine_takes_the_wheel_that_lies_in_pips_links(
    bootstrap: ModuleType, environment: ModuleType, env: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip(monkeypatch, environment, "--no-index")
    bootstrap.install_torch(env, has_gpu=False)
    assert pip.asked == [("--no-index", "--no-deps", environment.TORCH)]


@pytest.mark.parametrize("named", [None, "https://wheels.example/cpu"])
def test_where_none_lies_there_it_asks_a_cpu_index(
    bootstrap: ModuleType, environment: ModuleType, env: Any, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    pip = Pip(monkeypatch, environment)
    if named is not None:
        monkeypatch.setenv("TORCH_INDEX_URL", named)
    bootstrap.install_torch(env, has_gpu=False)
    index = named or environment.TORCH_CPU_INDEX
    assert pip.asked[1:] == [("--no-deps", "--index-url", index, environment.TORCH)]
    assert index.endswith("/cpu")


def test_a_gpu_machine_never_takes_the_cpu_wheel(
    bootstrap: ModuleType, environment: ModuleType, env: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip(monkeypatch, environment)
    monkeypatch.setattr(environment.Environment, "torch_build", lambda env: None)
    bootstrap.install_torch(env, has_gpu=True)
    assert pip.asked == [(f"{environment.TORCH},!={environment.TORCH_VERSION}+cpu",)]


def test_a_gpu_machine_keeps_its_owners_torch(
    bootstrap: ModuleType, environment: ModuleType, env: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip(monkeypatch, environment)
    monkeypatch.setattr(environment.Environment, "torch_build", lambda env: ("2.11.0", "13.0"))
    bootstrap.install_torch(env, has_gpu=True)
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
    environment: ModuleType,
    env: Any,
    monkeypatch: pytest.MonkeyPatch,
    build: tuple[str, str | None] | None,
    has_gpu: bool,
    said: str,
) -> None:
    monkeypatch.setattr(environment.Environment, "torch_build", lambda env: build)
    with pytest.raises(environment.EnvironmentFailed, match=said.replace("+", r"\+")):
        bootstrap.check_torch(env, has_gpu)


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
    environment: ModuleType, env: Any, monkeypatch: pytest.MonkeyPatch, stamp: str, starts: bool, over: bool
) -> None:
    monkeypatch.setattr(environment, "runs", lambda *command: starts)
    if stamp:
        env.stamp.write_text(stamp.format(root=environment.ROOT))
    assert env.must_start_over() == over


def test_a_changed_recipe_makes_the_environment_stale(env: Any) -> None:
    first = env.wanted_stamp()
    assert env.wanted_stamp() == first
    env.recipe[0].write_text("two")
    assert env.wanted_stamp() != first
    assert env.current_stamp() == ""


def test_a_gpu_that_comes_or_goes_makes_the_environment_stale(
    environment: ModuleType, bootstrap: ModuleType, kernels_env: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has another torch there; .venv-kernels has not."""
    stamps = []
    for gpu in (False, True):
        monkeypatch.setattr(environment, "has_gpu", lambda gpu=gpu: gpu)
        stamps.append([each.wanted_stamp() for each in (bootstrap.PROJECT, kernels_env.KERNELS)])
    assert [a == b for a, b in zip(*stamps, strict=True)] == [False, True]


@pytest.mark.parametrize(("gpu", "named"), [(False, True), (True, False)])
def test_the_kernels_torch_comes_from_the_index_that_is_named_for_a_cpu(
    environment: ModuleType, kernels_env: ModuleType, env: Any, monkeypatch: pytest.MonkeyPatch, gpu: bool, named: bool
) -> None:
    pip, index = Pip(monkeypatch, environment, environment.TORCH), "https://wheels.example/some"
    monkeypatch.setenv("TORCH_INDEX_URL", index)
    monkeypatch.setattr(kernels_env, "has_gpu", lambda: gpu)
    monkeypatch.setattr(environment.Environment, "make", lambda env: None)
    monkeypatch.setattr(environment.Environment, "torch_build", lambda env: ("2.13.0+cpu", None))
    no_link = lambda env, *arguments, **more: pip(*arguments, **more) and "--no-index" not in arguments  # noqa: E731
    monkeypatch.setattr(environment.Environment, "pip", no_link)
    kernels_env.build(env)
    asked = [arguments[arguments.index("--index-url") + 1] for arguments in pip.asked if "--index-url" in arguments]
    assert asked == [index if named else environment.TORCH_CPU_INDEX]


@pytest.mark.parametrize("build", [("2.13.0", "13.0"), None])
def test_kernels_with_the_wrong_torch_are_not_called_ready(
    environment: ModuleType,
    kernels_env: ModuleType,
    env: Any,
    monkeypatch: pytest.MonkeyPatch,
    build: tuple[str, str | None] | None,
) -> None:
    Pip(monkeypatch, environment, environment.TORCH)
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(environment, "runs", lambda *command: asked.append(command) or True)
    monkeypatch.setattr(environment.Environment, "make", lambda env: None)
    monkeypatch.setattr(environment.Environment, "torch_build", lambda env: build)
    with pytest.raises(environment.EnvironmentFailed, match="wanted a CPU build"):
        kernels_env.build(env)
    assert any("uninstall" in command for command in asked) == (build is not None), "one with CUDA is taken away first"


def test_every_file_that_a_recipe_is_made_of_makes_it_stale(bootstrap: ModuleType, kernels_env: ModuleType) -> None:
    for recipe, script in ((bootstrap.PROJECT.recipe, "bootstrap.py"), (kernels_env.KERNELS.recipe, "kernels_env.py")):
        assert [path.name for path in recipe] == [script, "environment.py", "bootstrap.sh", "pyproject.toml"]
        assert all(path.exists() for path in recipe)


def _finished(env: Any, exit_status: int = 0) -> None:
    """A python that says what it is asked, and ends so."""
    env.python.parent.mkdir()
    env.python.write_text(f"#!/bin/sh\necho \"asked: $* with $KEY\"\necho 'no such release'\nexit {exit_status}\n")
    env.python.chmod(0o755)


def test_what_pip_says_last_is_part_of_the_error(environment: ModuleType, env: Any) -> None:
    _finished(env, exit_status=1)
    with pytest.raises(environment.EnvironmentFailed, match=r"could not install torch(?s:.*)no such release(?s:.*)log"):
        env.pip("torch", wanted="torch")
    assert not env.pip("torch", settings={"KEY": "a setting"})
    assert "asked: -m pip install" in env.log.read_text()
    assert "torch with a setting" in env.log.read_text()


def test_it_is_built_where_it_is_stale_and_says_why_it_could_not(
    environment: ModuleType, env: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment.signal, "signal", lambda *_: None)  # pytest keeps its own

    def failing(env: Any) -> None:
        raise environment.EnvironmentFailed("pip could not install triton")

    _finished(env)
    assert env.bring_up(failing) == 1
    assert "No environment .venv: pip could not install triton" in capsys.readouterr().err
    built: list[Any] = []
    assert env.bring_up(built.append) == env.bring_up(built.append) == 0
    assert built == [env]


def test_the_kernels_are_built_without_cuda_and_past_pips_cache(
    environment: ModuleType, kernels_env: ModuleType, env: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel without its CUDA part in pip's cache would be what a GPU machine installs next."""
    pip = Pip(monkeypatch, environment, environment.TORCH)
    monkeypatch.setattr(environment.Environment, "make", lambda env: None)
    monkeypatch.setattr(environment.Environment, "torch_build", lambda env: ("2.13.0+cpu", None))
    kernels_env.build(env)
    *_, libraries, sources = pip.asked
    assert set(kernels_env.SOURCES) < set(sources)
    assert {"--no-cache-dir", "--no-build-isolation", "--no-deps"} < set(sources)
    assert pip.settings[-1] == kernels_env.WITHOUT_CUDA
    assert len(kernels_env.WITHOUT_CUDA) == 2 * len(kernels_env.SOURCES)
    assert environment.TORCH in libraries and any(package.startswith("pytest-timeout") for package in libraries)
    assert not any(package.startswith("transformers") for package in libraries)
