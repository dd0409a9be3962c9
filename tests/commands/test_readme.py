"""Every command and program of README.md is run, and gives what stands there. One that no test runs fails here."""

import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

from benchmarks.reference.service import free_port
from cluster.cli.main import main as cluster_main
from cluster.config import ServiceConfig
from cluster.ops import deployment
from tests.commands.readme import (
    ANYTHING,
    README,
    ROOT,
    Command,
    command,
    commands,
    fences,
    matches,
    outside_fences,
    printed,
    programs,
    shape,
)
from tests.goldens import VENDORED
from twotower.commands import main as twotower_main

MOST_LINES = 130
START_S, STOP_S, COMMAND_S = 150.0, 60.0, 90.0
# The machine whose output the README shows: on another one `up` chooses something else, and says so.
READMES_MACHINE = os.cpu_count() == 2 and not torch.cuda.is_available()
CHOICES = re.compile(r"\] (placement|device|\d+ tower processes|loading the towers)\b")

# How each command is run: make's targets are looked up, settings are tried without a service, the rest is run.
MAKE = re.compile(r"make [a-z-]+$")
SETTINGS = re.compile(r"\.venv/bin/python -m cluster up .*DIR")
RUN = re.compile(r"curl |\.venv/bin/python -m (cluster (generate|status)|twotower generate) ")


def of(kind: re.Pattern[str]) -> list[Command]:
    return [command for command in commands() if kind.match(command.line)]


def test_every_command_is_run_by_one_of_these_tests() -> None:
    for told in commands():
        assert sum(bool(kind.match(told.line)) for kind in (MAKE, SETTINGS, RUN)) == 1, told
    for program in programs():
        assert printed(program), "a program that says nothing cannot be checked"
    assert {language for language, _ in fences()} == {"console", "python", "text"}
    assert README.count("```") == 2 * len(fences())
    for drawing in (text for language, text in fences("text")):
        assert not re.search(r"^\s*(\$|make|curl|python|\.venv|kubectl|docker|pip) ", drawing, re.MULTILINE)
    assert not re.search(r"^ {4}\S", outside_fences(), re.MULTILINE), "a block without a fence is not checked"
    assert len(README.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|^\$ )make ([a-z-]+)", README, re.MULTILINE))))
def test_targets(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    help_ = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"make {target} " in help_


@pytest.mark.parametrize("words", sorted(set(re.findall(r"`python -m ([a-z. ]+)`", README))))
def test_commands_in_passing(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, *command = words.split()
    with pytest.raises(SystemExit) as ended:
        {"cluster": cluster_main, "twotower": twotower_main}[module]([*command, "--help"])
    assert ended.value.code == 0 and f"usage: python -m {words}" in capsys.readouterr().out


@pytest.mark.parametrize("told", of(SETTINGS), ids=str)
def test_settings(told: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """They mean a service of that checkpoint."""
    configs: list[ServiceConfig] = []
    monkeypatch.setattr("cluster.cli.up.Up.run", lambda self: configs.append(self._config))
    monkeypatch.chdir(ROOT)
    checkpoint = str(VENDORED / "tt_moe")
    arguments = shlex.split(told.line.replace("DIR", checkpoint))
    assert cluster_main(arguments[arguments.index("cluster") + 1 :]) == 0
    [config] = configs
    assert config.model.checkpoint == checkpoint and told.shown == ""
    deployment.check(config)


def test_what_the_first_start_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lines above the Makefile's own. Nothing is installed."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    environment, bootstrap = importlib.import_module("environment"), importlib.import_module("bootstrap")
    for step, result in {"make": None, "pip": True, "torch_build": None}.items():
        monkeypatch.setattr(environment.Environment, step, lambda *_, result=result, **__: result)
    for step in ("compile_what_is_used", "check_torch", "has_gpu"):
        monkeypatch.setattr(bootstrap, step, lambda *_: False)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    (tmp_path / ".venv").mkdir()
    recipe = tmp_path / "recipe"
    recipe.write_text("")
    environment.Environment(tmp_path / ".venv", (recipe,)).bring_up(bootstrap.build)
    for script in ("environment", "bootstrap"):
        del sys.modules[script]
    *made, said = command("make serve").shown.split("Starting", 1)
    assert shape(capsys.readouterr().out) == shape(*made)
    assert f'@echo "Starting{said.splitlines()[0]}"' in (ROOT / "Makefile").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Live:
    """The service that `make serve` starts, but on free ports. Where it listens, what it printed until it was ready,
    and the environment in which the other commands find it."""

    http: str
    grpc: str
    said: str
    environment: dict[str, str]

    def here(self, text: str) -> str:
        """A command or program of the README, for this service and this Python."""
        text = text.replace("127.0.0.1:8000", self.http).replace("127.0.0.1:50051", self.grpc)
        return text.replace(".venv/bin/python", shlex.quote(sys.executable))

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            arguments, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=COMMAND_S
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("readme")
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
    http, grpc = free_port(), free_port()
    arguments = [f"--set=ingress.http_port={http}", f"--set=ingress.grpc_port={grpc}"]
    output = folder / "said"
    with output.open("w") as file:
        up = subprocess.Popen(
            [sys.executable, "-m", "cluster", "up", *arguments], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    try:
        deadline = time.monotonic() + START_S
        while "Ctrl-C stops it" not in output.read_text():
            assert up.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        yield Live(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", output.read_text(), environment)
    finally:
        up.send_signal(signal.SIGINT)
        try:
            up.wait(STOP_S)
        finally:
            up.kill()


@pytest.mark.ray
@pytest.mark.timeout(300)
class TestOnTheService:
    def test_what_make_serve_prints(self, live: Live) -> None:
        _, shown = command("make serve").shown.split("stops it\n", 1)
        assert shown.endswith(f"try: {ANYTHING}\n")
        said, _ = live.said.split("try:", 1)
        # Sorted, because cells may be there before routers.
        assert _lines(f"{said}try: {ANYTHING}") == _lines(shown)

    @pytest.mark.parametrize("told", of(RUN), ids=str)
    def test_commands(self, live: Live, told: Command) -> None:
        _require(told.line.split()[0])
        real = live.run("bash", "-c", live.here(told.line))
        assert matches(told.shown.strip(), real.strip()), real

    @pytest.mark.parametrize("program", programs(), ids=lambda program: program.split("\n")[0])
    def test_programs(self, live: Live, program: str) -> None:
        assert live.run(sys.executable, "-c", live.here(program)).splitlines() == printed(program)

    def test_prompts_end_with_a_newline_because_the_model_writes_it_otherwise(self, live: Live) -> None:
        def answer(prompt: str) -> str:
            response = httpx.post(f"http://{live.http}/v1/completions", json={"prompt": prompt}, timeout=60)
            text: str = response.json()["choices"][0]["text"]
            return text

        assert answer("words: 2009") == "\n" + answer("words: 2009\n")


def _lines(output: str) -> list[str]:
    lines = (line for line in output.splitlines() if line and (READMES_MACHINE or not CHOICES.search(line)))
    return sorted(map(shape, lines))


def _require(program: str) -> None:
    """Skips where a system program is missing; fails there when REQUIRE_ALL=1."""
    if program.startswith(".venv") or shutil.which(program):
        return
    if os.environ.get("REQUIRE_ALL") == "1":
        pytest.fail(f"{program} is not installed")
    pytest.skip(f"{program} is not installed")
