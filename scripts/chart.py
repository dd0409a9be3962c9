"""Writes the generated files of the Helm chart. These are the part of its schema that the service's settings declare,
and the rendered manifests of deploy/kuberay. With --check, only says whether they are up to date.

Without Helm the manifests are left unchanged, with a message; with REQUIRE_ALL=1 that is an error.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.config import ServiceConfig

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "deploy" / "helm" / "twotower"
SCHEMA = CHART / "values.schema.json"
# By `make deploy-env`; else the PATH's.
TOOLS = ROOT / ".venv-deploy" / "bin"
RENDERED = {
    "rayservice.yaml": "two-gpus",
    "rayservice-cpu.yaml": "cpu-demo",
    "rayservice-protected.yaml": "protected",
}
RELEASE = "twotower"
_OF_PYDANTIC = "title"  # a field's name again, with spaces


def helm() -> str | None:
    return shutil.which("helm", path=str(TOOLS)) or shutil.which("helm")


def template(values: str, *options: str, release: str = RELEASE) -> subprocess.CompletedProcess[str]:
    """What Helm says for one of the chart's own values files."""
    command = [helm() or "helm", "template", release, str(CHART), "--values", str(CHART / "values" / f"{values}.yaml")]
    return subprocess.run([*command, *options], capture_output=True, text=True)


def schema() -> str:
    """The chart's schema, with what the service's own settings may be."""
    whole = json.loads(SCHEMA.read_text(encoding="utf-8"))
    declared = _without_titles(ServiceConfig.model_json_schema())
    whole["$defs"] |= {**declared.pop("$defs"), ServiceConfig.__name__: declared}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _without_titles(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_titles(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_titles(item) for key, item in value.items() if not (key == _OF_PYDANTIC and isinstance(item, str))
    }


def manifest(values: str) -> str:
    """A manifest for `kubectl apply`."""
    made = template(values)
    if made.returncode:
        sys.exit(made.stderr)
    text = "".join(line for line in made.stdout.splitlines(keepends=True) if not line.startswith("# Source: "))
    head = f"# Made by `make docs`: the chart deploy/helm/twotower with values/{values}.yaml. Change these.\n"
    return head + text


def made_of_settings() -> dict[Path, str]:
    return {SCHEMA: schema()}


def made_by_helm() -> dict[Path, str]:
    """By the schema that is there."""
    if helm() is None:
        message = "deploy/kuberay is not looked at: no helm here (`make deploy-env` brings one)"
        if os.environ.get("REQUIRE_ALL") == "1":
            sys.exit(message)
        print(message)
        return {}
    return {ROOT / "deploy" / "kuberay" / name: manifest(values) for name, values in RENDERED.items()}


def stale(files: Mapping[Path, str]) -> list[Path]:
    """Those that are not what they should be."""
    return [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def main() -> None:
    for made in (made_of_settings, made_by_helm):
        files = made()
        found = stale(files)
        if found and "--check" in sys.argv[1:]:
            names = ", ".join(str(path.relative_to(ROOT)) for path in found)
            sys.exit(f"not what the chart and the settings make; run `make docs`: {names}")
        for path in found:
            path.write_text(files[path], encoding="utf-8")


if __name__ == "__main__":
    main()
