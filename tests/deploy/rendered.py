"""What the chart makes, as objects: the RayService, its groups of pods, and what is around it."""

from pathlib import Path
from typing import Any

import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.config import ServiceConfig

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_COMPONENT = "app.kubernetes.io/component"

Object = dict[str, Any]


class Group:
    """Pods of one kind: the head, the routers' or the cells'."""

    def __init__(self, spec: Object) -> None:
        self.spec, self.template = spec, spec["template"]
        self.pod: Object = self.template["spec"]
        [self.container] = self.pod["containers"]

    @property
    def component(self) -> str:
        return str(self.labels[_COMPONENT])

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.template["metadata"]["labels"]
        return labels

    @property
    def environment(self) -> dict[str, str]:
        return {variable["name"]: variable["value"] for variable in self.container["env"]}

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @property
    def limits(self) -> Object:
        limits: Object = self.container["resources"]["limits"]
        return limits

    @property
    def probe(self) -> str:
        return str(self.container["readinessProbe"]["exec"]["command"][-1])

    @property
    def drain_s(self) -> float:
        return float(self.environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])

    @property
    def grace_s(self) -> float:
        return float(self.pod["terminationGracePeriodSeconds"])

    @property
    def mounts(self) -> Object:
        """Volumes by the path they are mounted at."""
        volumes = {volume["name"]: volume for volume in self.pod.get("volumes", [])}
        return {mount["mountPath"]: volumes[mount["name"]] for mount in self.container.get("volumeMounts", [])}


class Rendered:
    def __init__(self, objects: list[Object]) -> None:
        self.objects = objects
        [self.service] = self.of_kind("RayService")
        cluster = self.service["spec"]["rayClusterConfig"]
        self.cluster: Object = cluster
        self.head = Group(cluster["headGroupSpec"])
        groups = {spec["groupName"]: Group(spec) for spec in cluster["workerGroupSpecs"]}
        self.routers, self.cells = groups.pop("routers"), groups.pop("cells")
        assert not groups
        self.groups = (self.head, self.routers, self.cells)

    @classmethod
    def read(cls, text: str) -> "Rendered":
        return cls([document for document in yaml.load_all(text, Loader=_LOADER) if document])

    @classmethod
    def load(cls, path: Path) -> "Rendered":
        return cls.read(path.read_text(encoding="utf-8"))

    def of_kind(self, kind: str) -> list[Object]:
        return [document for document in self.objects if document["kind"] == kind]

    @property
    def serve(self) -> Object:
        serve: Object = yaml.load(self.service["spec"]["serveConfigV2"], Loader=_LOADER)
        return serve

    @property
    def deployed(self) -> ServeDeploySchema:
        return ServeDeploySchema.model_validate(self.serve)

    @property
    def config(self) -> ServiceConfig:
        [application] = self.serve["applications"]
        return ServiceConfig.parse(application["args"])
