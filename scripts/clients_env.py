"""Makes .venv-clients for this checkout: clients that other people wrote, for tests that ask our service with them.

None of it is what our code runs with, and some of it wants other versions than .venv has.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from environment import ROOT, Environment, EnvironmentFailed

HERE = Path(__file__).resolve()
CLIENTS = Environment(ROOT / ".venv-clients", (HERE, HERE.with_name("environment.py"), HERE.with_name("bootstrap.sh")))

PYTHON_CLIENTS = ("lm_eval[api]==0.4.13", "litellm==1.110.2", "langchain-openai==1.7.4", "transformers>=5.0,<6")
NODE_CLIENTS = ("openai@6.30.1", "@grpc/grpc-js@1.14.7", "@grpc/proto-loader@0.8.1")


def build(env: Environment) -> None:
    print(f"[1/3] Python {sys.version.split()[0]} ({sys.executable}) in {env.venv.name}", flush=True)
    env.make()
    print(f"[2/3] {', '.join(PYTHON_CLIENTS)}", flush=True)
    env.pip(*PYTHON_CLIENTS, wanted="the clients for Python")
    print(f"[3/3] {', '.join(NODE_CLIENTS)}", flush=True)
    install_node_clients(env)


def install_node_clients(env: Environment) -> None:
    """Into `node_modules` of the environment. Where there is no npm, the tests that need it say so."""
    npm = shutil.which("npm")
    if npm is None:
        print("      no npm here: without the clients for Node", flush=True)
        return
    options = ("--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(env.venv))
    with env.log.open("a") as log:
        made = subprocess.run([npm, "install", *options, *NODE_CLIENTS], stdout=log, stderr=log)
    if made.returncode:
        raise EnvironmentFailed(f"npm could not install the clients for Node. The log: {env.log}")


if __name__ == "__main__":
    sys.exit(CLIENTS.bring_up(build))
