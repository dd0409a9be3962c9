"""The RayService manifests: valid for the operator, for Serve and for our configuration, and big enough for a cell."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from actors.settings import bundles
from cluster.app import cell_settings, router_deployment
from cluster.config import ServiceConfig
from tests.deploy.crd import problems
from twotower.errors import ConfigError

_DIRECTORY = Path(__file__).resolve().parents[2] / "deploy" / "kuberay"
NAMES = sorted(path.name for path in _DIRECTORY.glob("*.yaml"))
MANIFESTS = pytest.mark.parametrize("name", NAMES)
_DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"

Manifest = dict[str, Any]


def _manifest(name: str) -> Manifest:
    manifest: Manifest = yaml.safe_load((_DIRECTORY / name).read_text(encoding="utf-8"))
    return manifest


def _serve(manifest: Manifest) -> Manifest:
    serve: Manifest = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    return serve


def _config(manifest: Manifest) -> ServiceConfig:
    [application] = _serve(manifest)["applications"]
    return ServiceConfig.parse(application["args"])


def _head(manifest: Manifest) -> Manifest:
    head: Manifest = manifest["spec"]["rayClusterConfig"]["headGroupSpec"]
    return head


def _workers(manifest: Manifest) -> Manifest:
    [group] = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    workers: Manifest = group
    return workers


def _container(group: Manifest) -> Manifest:
    [container] = group["template"]["spec"]["containers"]
    only: Manifest = container
    return only


def _environment(group: Manifest) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in _container(group)["env"]}


def _ports(group: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in _container(group)["ports"]}


@MANIFESTS
def test_valid_for_the_operator(name: str) -> None:
    assert problems(_manifest(name)) == []


def _unknown_field(manifest: Manifest) -> None:
    _workers(manifest)["minReplica"] = 1


def _wrong_type(manifest: Manifest) -> None:
    _workers(manifest)["maxReplicas"] = "two"


def _missing_template(manifest: Manifest) -> None:
    del _workers(manifest)["template"]


def _start_parameter_of_wrong_type(manifest: Manifest) -> None:
    _head(manifest)["rayStartParams"]["num-cpus"] = 0


def _container_without_name(manifest: Manifest) -> None:
    del _container(_head(manifest))["name"]


@pytest.mark.parametrize(
    ("spoil", "path"),
    [
        (_unknown_field, "workerGroupSpecs[0]"),
        (_wrong_type, "maxReplicas"),
        (_missing_template, "workerGroupSpecs[0]"),
        (_start_parameter_of_wrong_type, "num-cpus"),
        (_container_without_name, "containers[0]"),
    ],
)
def test_mistakes_are_found(spoil: Callable[[Manifest], None], path: str) -> None:
    manifest = deepcopy(_manifest("rayservice.yaml"))
    spoil(manifest)
    [problem] = problems(manifest)
    assert path in problem


@MANIFESTS
def test_the_serve_config_is_valid_for_serve_and_for_us(name: str) -> None:
    manifest = _manifest(name)
    deployed = ServeDeploySchema.model_validate(_serve(manifest))
    [application] = deployed.applications
    assert (application.import_path, application.route_prefix) == ("cluster.app:build", "/")
    cell = _config(manifest).cell
    assert "auto" not in (cell.placement, cell.device), "what pods are there when it is built must not decide"


def test_a_typo_in_our_settings_is_found() -> None:
    [application] = _serve(_manifest("rayservice.yaml"))["applications"]
    application["args"]["cell"]["placment"] = "split"
    with pytest.raises(ConfigError, match="did you mean placement"):
        ServiceConfig.parse(application["args"])


@MANIFESTS
def test_a_worker_pod_is_a_cell(name: str) -> None:
    """All bundles of a cell and every router fit one pod, and its GPUs are exactly one cell's."""
    manifest = _manifest(name)
    config, limits = _config(manifest), _container(_workers(manifest))["resources"]["limits"]
    gpus = limits.get("nvidia.com/gpu", 0)
    wanted = bundles(cell_settings(config))
    router = router_deployment(config).ray_actor_options
    assert router is not None
    routers = config.cluster.num_routers * router["num_cpus"]
    assert sum(bundle["CPU"] for bundle in wanted) + routers <= float(limits["cpu"])
    assert sum(bundle.get("GPU", 0) for bundle in wanted) == gpus


@MANIFESTS
def test_there_is_a_pod_for_every_cell(name: str) -> None:
    manifest = _manifest(name)
    workers, cluster = _workers(manifest), _config(manifest).cluster
    assert (workers["minReplicas"], workers["maxReplicas"]) == (cluster.min_cells, cluster.max_cells)
    scales = cluster.min_cells < cluster.max_cells
    assert manifest["spec"]["rayClusterConfig"].get("enableInTreeAutoscaling", False) is scales


@MANIFESTS
def test_device_does_not_depend_on_which_pods_are_up(name: str) -> None:
    assert _config(_manifest(name)).cell.device != "auto"


@MANIFESTS
def test_ports_agree_everywhere(name: str) -> None:
    manifest = _manifest(name)
    ingress = _config(manifest).ingress
    wanted = {"serve": ingress.http_port, "serve-grpc": ingress.grpc_port}
    assert _serve(manifest)["http_options"] == {"host": "0.0.0.0", "port": ingress.http_port}
    assert ingress.host == "0.0.0.0"
    assert _ports(_workers(manifest)) == wanted
    assert _ports(_head(manifest)).items() >= wanted.items()
    probe = _container(_workers(manifest))["readinessProbe"]["exec"]["command"][-1]
    assert f"localhost:{ingress.http_port}/-/healthz" in probe and f"/{ingress.grpc_port}'" in probe


@MANIFESTS
def test_the_head_runs_nothing_of_ours_and_gets_no_requests(name: str) -> None:
    manifest = _manifest(name)
    assert _head(manifest)["rayStartParams"]["num-cpus"] == "0"
    assert manifest["spec"]["excludeHeadPodFromServeSvc"] is True


@MANIFESTS
def test_nothing_reports_to_anybody(name: str) -> None:
    manifest = _manifest(name)
    for group in (_head(manifest), _workers(manifest)):
        environment = _environment(group)
        assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
        assert environment["RAY_USAGE_STATS_REPORT_URL"].startswith("http://127.0.0.1:")


def test_streams_may_finish_before_a_pod_ends() -> None:
    manifest = _manifest("rayservice.yaml")
    workers = _workers(manifest)
    drain = float(_environment(workers)[_DRAIN_VARIABLE])
    assert _config(manifest).cluster.drain_timeout_s < drain
    assert drain < workers["template"]["spec"]["terminationGracePeriodSeconds"]


def test_the_checkpoint_is_on_a_mounted_volume() -> None:
    manifest = _manifest("rayservice.yaml")
    pod = _workers(manifest)["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in _container(_workers(manifest))["volumeMounts"]}
    [path] = [path for path in mounts if _config(manifest).model.checkpoint.startswith(f"{path}/")]
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == mounts[path]]
    assert "persistentVolumeClaim" in volume


def test_there_are_manifests() -> None:
    assert "rayservice.yaml" in NAMES
