"""A virtual environment of this checkout, made by a recipe: logged, stamped, safe to interrupt and to run twice.

Runs on a bare Python 3.11-3.13, so it uses the standard library alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILDING = "building"
SUITABLE = "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"

TORCH_VERSION = "2.13.0"
TORCH = f"torch=={TORCH_VERSION}"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class EnvironmentFailed(Exception):
    """The environment could not be made; the message says why and what to do."""


def runs(*command: str | Path) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def has_gpu() -> bool:
    return runs("nvidia-smi", "-L")


def show_progress(line: str) -> None:
    """Rewrites one line of the terminal; a log file gets none of it."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 7
        print(f"\r\x1b[K      {line.strip()[:width]}" if line else "\r\x1b[K", end="", flush=True)


@dataclass(frozen=True)
class Environment:
    """Where it lies, and the files that say what belongs in it. `for_gpus`: its torch is another one where there is a
    GPU."""

    venv: Path
    recipe: tuple[Path, ...]
    for_gpus: bool = False

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.venv / "bootstrap-stamp"

    @property
    def log(self) -> Path:
        return self.venv / "bootstrap.log"

    def wanted_stamp(self) -> str:
        """What a finished environment carries: a digest of its recipe and of the machine's kind, and the checkout that
        it belongs to."""
        digest = hashlib.sha256()
        for part in self.recipe:
            digest.update(part.read_bytes())
        if self.for_gpus and has_gpu():
            digest.update(b"GPU")
        return f"{digest.hexdigest()} {ROOT}"

    def current_stamp(self) -> str:
        return self.stamp.read_text() if self.stamp.exists() else ""

    def must_start_over(self) -> bool:
        """True where what is there cannot be mended in place: first build cut short, Python gone, or checkout moved."""
        stamp = self.current_stamp()
        moved = stamp not in ("", BUILDING) and stamp.split(" ", 1)[1] != str(ROOT)
        return stamp == BUILDING or moved or not runs(self.python, "-c", f"import pip; {SUITABLE}")

    def make(self) -> None:
        """The bare environment, or one to mend."""
        if self.must_start_over():
            shutil.rmtree(self.venv, ignore_errors=True)
            self.venv.mkdir(exist_ok=True)
            self.stamp.write_text(BUILDING)
            made = subprocess.run([sys.executable, "-m", "venv", self.venv], capture_output=True, text=True)
            if made.returncode:
                raise EnvironmentFailed(f"{sys.executable} -m venv failed:\n{made.stdout}{made.stderr}")
        else:
            self.stamp.unlink(missing_ok=True)

    def pip(self, *arguments: str, wanted: str | None = None, settings: Mapping[str, str] | None = None) -> bool:
        """Runs `pip install`, its output going to the log, with `settings` in its environment. `wanted` names what
        cannot be missing; None lets a caller try elsewhere."""
        options = ("--no-input", "--no-compile", "--disable-pip-version-check")
        command = [str(self.python), "-m", "pip", "install", *options, *arguments]
        environment = {**os.environ, **(settings or {})}
        lines = []
        with self.log.open("a") as log:
            print("$", *command, file=log, flush=True)
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            )
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    lines.append(line)
                    show_progress(line)
            except BaseException:
                process.terminate()
                raise
            finally:
                process.wait()
                process.stdout.close()
                show_progress("")
        if process.returncode and wanted:
            raise EnvironmentFailed(f"pip could not install {wanted}:\n{''.join(lines[-15:])}The whole log: {self.log}")
        return process.returncode == 0

    def torch_build(self) -> tuple[str, str | None] | None:
        """Version of the installed torch and of the CUDA it was built for; None where no torch imports."""
        if not self.python.exists():
            return None
        report = "import torch; print(torch.__version__, torch.version.cuda or '-')"
        asked = subprocess.run([self.python, "-c", report], capture_output=True, text=True)
        if asked.returncode:
            return None
        version, cuda = asked.stdout.split()
        return version, None if cuda == "-" else cuda

    def install_cpu_torch(self, index: str = TORCH_CPU_INDEX) -> None:
        """The wheel that lies in pip's own links, or the index's. One with CUDA that is there already is replaced."""
        if (build := self.torch_build()) and build[1]:
            runs(self.python, "-m", "pip", "uninstall", "--yes", "torch")
        # --no-deps: --no-index would look for torch's dependencies in the links too; they come with what needs torch.
        if not self.pip("--no-index", "--no-deps", TORCH):
            self.pip("--no-deps", "--index-url", index, TORCH, wanted=f"{TORCH} from {index}")

    def bring_up(self, build: Callable[[Environment], None]) -> int:
        """Builds it where it is missing or stale. The exit status for a shell."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a pip under way is ended too
        with self.recipe[0].open("rb") as lock:
            try:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"Another make in this checkout is preparing {self.venv.name}; waiting for it", flush=True)
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if self.current_stamp() != self.wanted_stamp() or not runs(self.python, "-c", ""):
                    started = time.monotonic()
                    build(self)
                    self.stamp.write_text(self.wanted_stamp())
                    print(f"      {self.venv.name} is ready after {time.monotonic() - started:.0f} s", flush=True)
            except KeyboardInterrupt:
                print("\nInterrupted; run it again.", file=sys.stderr)
                return 130
            except (EnvironmentFailed, OSError) as error:
                print(f"No environment {self.venv.name}: {error}", file=sys.stderr)
                return 1
        return 0
