"""Makes .venv-site for this checkout: what builds the site of the documents (docs/site)."""

from __future__ import annotations

import sys
from pathlib import Path

from environment import ROOT, Environment

HERE = Path(__file__).resolve()
SITE = Environment(ROOT / ".venv-site", (HERE, HERE.with_name("environment.py"), HERE.with_name("bootstrap.sh")))

WANTED = ("sphinx==9.0.4", "myst-parser==5.2.0", "furo==2025.12.19")


def build(env: Environment) -> None:
    print(f"[1/2] Python {sys.version.split()[0]} ({sys.executable}) in {env.venv.name}", flush=True)
    env.make()
    print(f"[2/2] {', '.join(WANTED)}", flush=True)
    env.pip(*WANTED, wanted="what builds the site")


if __name__ == "__main__":
    sys.exit(SITE.bring_up(build))
