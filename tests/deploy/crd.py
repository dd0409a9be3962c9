"""KubeRay's custom resource definition as a JSON schema that finds what the API server would refuse."""

import os
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

_BESIDE_THE_CHECKOUT = Path(__file__).resolve().parents[3] / "shared" / "schemas"
_FILE = "ray.io_rayservices.yaml"


def require_crd() -> Path:
    """The definition's file. Skips where it is absent; fails there when REQUIRE_ALL=1."""
    path = Path(os.environ.get("KUBERAY_CRD_DIR", _BESIDE_THE_CHECKOUT)) / _FILE
    if not path.exists():
        message = f"KubeRay's {_FILE} is not in {path.parent}; set KUBERAY_CRD_DIR"
        if os.environ.get("REQUIRE_ALL") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return path


def problems(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a RayService manifest: `path: message`, one each."""
    validator = _validator(require_crd())
    errors = sorted(validator.iter_errors(manifest), key=lambda error: list(map(str, error.absolute_path)))
    return [f"{error.json_path}: {error.message}" for error in errors]


@cache
def _validator(path: Path) -> jsonschema.Draft202012Validator:
    definition = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    [version] = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema = deepcopy(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return jsonschema.Draft202012Validator(_strict(schema))


def _strict(schema: Any) -> Any:
    """Kubernetes' dialect as JSON schema: unknown fields are errors, and its three extensions are spelled out."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if strict.pop("x-kubernetes-int-or-string", False):
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = strict.get("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(strict.get("properties"), dict) and not open_ended:
        strict.setdefault("additionalProperties", False)
    if strict.pop("nullable", False) is True:
        return {"anyOf": [strict, {"type": "null"}]}
    return strict
