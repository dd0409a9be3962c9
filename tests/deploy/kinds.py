"""What the API server would refuse in objects of Kubernetes' own kinds."""

import json
from functools import cache
from typing import Any

import jsonschema
from referencing import Registry, Resource

from scripts import chart
from tests.deploy import crd
from tests.deploy.chart import require
from tests.deploy.rendered import Object

_SCHEMAS = chart.TOOLS.parent / "schemas"
# Their definitions come with their own operators. The tests look at what we write there.
OF_OTHERS = ("GRPCRoute", "HTTPRoute", "PodMonitor", "PrometheusRule")


def problems(found: Object) -> list[str]:
    """`path: message`, one each."""
    if found["kind"] == "RayService":
        return crd.problems(found)
    errors = _validator(found["apiVersion"], found["kind"]).iter_errors(found)
    return [f"{error.json_path}: {error.message}" for error in errors]


@cache
def _validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    """policy/v1 lies under policy-v1, networking.k8s.io/v1 under networking-v1."""
    group, _, version = api_version.rpartition("/")
    name = "-".join(filter(None, (kind.lower(), group.partition(".")[0], version)))
    return jsonschema.Draft202012Validator(_read(name), registry=_definitions())


@cache
def _definitions() -> "Registry[Any]":
    return Resource.from_contents(_read("_definitions")) @ Registry()


def _read(name: str) -> Any:
    path = require(_SCHEMAS / f"{name}.json", f"schema {name}")
    with open(path, encoding="utf-8") as file:
        return json.load(file)
