"""What Kubernetes and accidents do to our RayService, and what clients notice: the cases that tests/pods leaves out.

Starts Ray as KubeRay does, on hosts that are network namespaces without a way out, with the demo on CPUs. Clients ask
over both faces in all modes, with a key and over TLS. Every answer is compared with the library's own, given before.
Exit status 1 where a request fails, an answer is another one, a stranger gets one, or something does not come about.
Wants Linux and root.

examples:
  python -m benchmarks.pods --output benchmarks/results/pods_<hardware>_<date>.md
  python -m benchmarks.pods --cases head,router
"""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the towers of the demo are so small that threads only wait

from benchmarks.pods_parts.cases import CASES, Case
from benchmarks.pods_parts.network import PROGRAMS, why_not
from benchmarks.pods_parts.report import Result, acceptance, render
from benchmarks.pods_parts.site import CLIENTS, PATH
from benchmarks.reference.report import setting

_NAMES = tuple(case.name for case in CASES)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    cases = [case for case in CASES if case.name in options.cases]
    _require(cases)
    load_before, began = os.getloadavg()[0], time.monotonic()
    results = [_run(case, options.keep) for case in cases]
    command = shlex.join(["python", "-m", "benchmarks.pods", *(sys.argv[1:] if arguments is None else arguments)])
    where = setting(load_before, command) | _what(time.monotonic() - began)
    report = render(results, where)
    if options.output is None:
        print(report)
    else:
        options.output.write_text(report, encoding="utf-8")
        print(f"{acceptance(results)}\nwritten to {options.output}")
    return int(not all(result.passed for result in results))


def _run(case: Case, keep: Path | None) -> Result:
    """Whatever goes wrong becomes part of the result: the other cases run, too."""
    print(f"{case.name}: {case.what}", flush=True)
    result = Result(case.name, case.what)
    directory = Path(tempfile.mkdtemp(prefix=f"{case.name}-", dir=keep))
    try:
        case.run(directory, result)
    except Exception as error:
        result.wrong += _told(error)
        print(*result.wrong, sep="\n", file=sys.stderr, flush=True)
    finally:
        if keep is None:
            shutil.rmtree(directory)
    print(acceptance([result]), flush=True)
    return result


def _told(error: BaseException) -> list[str]:
    """The first cause first: what fails while a case is put away may hide it."""
    before = [] if error.__context__ is None else _told(error.__context__)
    return [*before, f"{type(error).__name__}: {error}"]


def _require(cases: Sequence[Case]) -> None:
    """Raises SystemExit where one of them cannot run here."""
    missing = sorted({program for case in cases for program in case.needs if not shutil.which(program, path=PATH)})
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}, which --cases {','.join(c.name for c in cases)} wants")
    if (problem := why_not()) is not None:
        raise SystemExit(f"hosts are network namespaces, which want Linux, root and {', '.join(PROGRAMS)}: {problem}")


def _what(seconds: float) -> dict[str, str]:
    return {
        "service": "demo, colocated, a cell and a router on each of two hosts, by "
        "`deploy/kuberay/rayservice-protected.yaml` "
        "with what `benchmarks/pods_parts/manifest.py` changes",
        "load": f"{CLIENTS} clients in closed loops beside the service, on the same cores: diffusion, mock_ar, ar, "
        "scores; gRPC and HTTP; streams and whole answers; 2 of them with rests while processes start",
        "protection": "keys, TLS and, on gRPC, clients' certificates: every request has its key and is said over TLS; "
        "clients check the certificate's issuer and name",
        "took": f"{seconds / 60:.1f} minutes",
    }


def _words(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(_NAMES):
        raise argparse.ArgumentTypeError(f"got {', '.join(sorted(unknown))}, wanted some of {', '.join(_NAMES)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", type=_words, default=_NAMES, metavar="A,B", help=f"of {','.join(_NAMES)} (all)")
    add("--keep", type=Path, metavar="DIRECTORY", help="leave what the pods have written there")
    add("--output", type=Path, metavar="FILE.md", help="write the report there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
