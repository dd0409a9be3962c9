"""Makes .venv for this checkout: torch for this machine, then the project, editable, with its serve and dev extras.

Runs on a bare Python 3.11-3.13, so it uses the standard library alone. Safe to interrupt and to run twice at once.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "bootstrap-stamp"
LOG = VENV / "bootstrap.log"
BUILDING = "building"
SUITABLE = "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"

# Half of the installed files, and none that a tower, a router or a test imports.
SELDOM_USED = r"/transformers/models/(?!auto/|nemotron_h/|__init__)|/tests/|/torch/testing/|/torch/_inductor/|/sympy/"

TORCH_VERSION = "2.13.0"
TORCH = f"torch=={TORCH_VERSION}"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class BootstrapError(Exception):
    """The environment could not be made; the message says why and what to do."""


def wanted_stamp() -> str:
    """What a finished environment of this checkout carries: a digest of its recipe, and where it lives."""
    digest = hashlib.sha256()
    for recipe in (ROOT / "pyproject.toml", Path(__file__), Path(__file__).with_suffix(".sh")):
        digest.update(recipe.read_bytes())
    return f"{digest.hexdigest()} {ROOT}"


def current_stamp() -> str:
    return STAMP.read_text() if STAMP.exists() else ""


def runs(*command: str | Path) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def must_start_over() -> bool:
    """True where what is there cannot be mended in place: first build cut short, Python gone, or checkout moved."""
    stamp = current_stamp()
    moved = stamp not in ("", BUILDING) and stamp.split(" ", 1)[1] != str(ROOT)
    return stamp == BUILDING or moved or not runs(PYTHON, "-c", f"import pip; {SUITABLE}")


def pip(*arguments: str, wanted: str | None = None) -> bool:
    """Runs `pip install`, its output going to the log. `wanted` names what cannot be missing; None lets a caller try
    elsewhere."""
    options = ("--no-input", "--no-compile", "--disable-pip-version-check")
    command = [str(PYTHON), "-m", "pip", "install", *options, *arguments]
    lines = []
    with LOG.open("a") as log:
        print("$", *command, file=log, flush=True)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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
        raise BootstrapError(f"pip could not install {wanted}:\n{''.join(lines[-15:])}The whole log: {LOG}")
    return process.returncode == 0


def show_progress(line: str) -> None:
    """Rewrites one line of the terminal; a log file gets none of it."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 7
        print(f"\r\x1b[K      {line.strip()[:width]}" if line else "\r\x1b[K", end="", flush=True)


def make_venv() -> None:
    if must_start_over():
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir(exist_ok=True)
        STAMP.write_text(BUILDING)
        made = subprocess.run([sys.executable, "-m", "venv", VENV], capture_output=True, text=True)
        if made.returncode:
            raise BootstrapError(f"{sys.executable} -m venv failed:\n{made.stdout}{made.stderr}")
    else:
        STAMP.unlink(missing_ok=True)


def compile_what_is_used() -> None:
    """Bytecode, on all cores, of what our processes import: pip would compile everything, one file after the other.

    The rest is compiled when it is imported, as Python does.
    """
    packages = next((VENV / "lib").glob("python3.*/site-packages"))
    subprocess.run([PYTHON, "-m", "compileall", "-q", "-j", "0", "-x", SELDOM_USED, packages], capture_output=True)


def torch_build() -> tuple[str, str | None] | None:
    """Version of the installed torch and of the CUDA it was built for; None where no torch imports."""
    report = "import torch; print(torch.__version__, torch.version.cuda or '-')"
    asked = subprocess.run([PYTHON, "-c", report], capture_output=True, text=True)
    if asked.returncode:
        return None
    version, cuda = asked.stdout.split()
    return version, None if cuda == "-" else cuda


def install_torch(has_gpu: bool) -> None:
    index = os.environ.get("TORCH_INDEX_URL")
    if has_gpu:
        if (build := torch_build()) and build[1]:
            return  # the owner's own choice of CUDA build
        # A CPU wheel in pip's configured links would win over the index's build, because "+cpu" sorts above it.
        source = ("--index-url", index) if index else ()
        pip(*source, f"{TORCH},!={TORCH_VERSION}+cpu", wanted=f"{TORCH} with CUDA")
    # --no-deps: --no-index would look for torch's dependencies in the links too; they come with the project's.
    elif not pip("--no-index", "--no-deps", TORCH):
        index = index or TORCH_CPU_INDEX
        pip("--no-deps", "--index-url", index, TORCH, wanted=f"{TORCH} from {index}")


def check_torch(has_gpu: bool) -> None:
    """The wrong torch would cost gigabytes, or run the towers on the CPU of a GPU machine without a word."""
    build = torch_build()
    if build is None:
        raise BootstrapError(f"torch is installed but does not import; see {PYTHON} -c 'import torch'")
    version, cuda = build
    if (cuda is not None) != has_gpu:
        machine = "an NVIDIA GPU" if has_gpu else "no NVIDIA GPU"
        kind = f"built for CUDA {cuda}" if cuda else "a CPU build"
        raise BootstrapError(
            f"this machine has {machine}, but torch {version} is {kind}. Delete .venv and run again; "
            "if it comes back, set TORCH_INDEX_URL to PyTorch's wheel index for this machine"
        )


def build() -> None:
    started = time.monotonic()
    has_gpu = runs("nvidia-smi", "-L")
    print(f"[1/3] Python {sys.version.split()[0]} ({sys.executable}) in .venv", flush=True)
    make_venv()
    kind = "with CUDA: nvidia-smi sees a GPU" if has_gpu else "CPU build: no NVIDIA GPU here"
    print(f"[2/3] {TORCH}, {kind}", flush=True)
    install_torch(has_gpu)
    print("[3/3] The project and what it needs (a minute or two the first time)", flush=True)
    pip("--editable", f"{ROOT}[serve,dev]", wanted="the project's dependencies")
    compile_what_is_used()
    check_torch(has_gpu)
    STAMP.write_text(wanted_stamp())
    print(f"      .venv is ready after {time.monotonic() - started:.0f} s", flush=True)


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a pip under way is ended too
    with Path(__file__).open("rb") as lock:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Another make in this checkout is preparing .venv; waiting for it", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if current_stamp() == wanted_stamp() and runs(PYTHON, "-c", ""):
                return 0
            build()
        except KeyboardInterrupt:
            print("\nInterrupted; run it again.", file=sys.stderr)
            return 130
        except (BootstrapError, OSError) as error:
            print(f"No environment: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
