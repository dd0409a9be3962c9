"""The chart's output, committed in deploy/kuberay and rendered for each of its values files. It must be valid for the
operator, for Serve and for our configuration. Every size, port, name and time must agree.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache

import pytest
from ray.serve import Application

from actors.settings import bundles
from cluster import app
from cluster.app import cell_settings
from cluster.http_options import http_options
from cluster.message_size import largest_message
from cluster.ops.local_ray import _SETTINGS
from cluster.router import LAST_WORDS_S
from scripts import chart
from tests.deploy import crd
from tests.deploy.chart import VALUES, rendered
from tests.deploy.rendered import Group, Object, Rendered
from twotower.errors import ConfigError

_DIRECTORY = chart.ROOT / "deploy" / "kuberay"
COMMITTED = sorted(path.name for path in _DIRECTORY.glob("*.yaml"))
ROUTER = "twotower_router"


@cache
def _committed(name: str) -> Rendered:
    return Rendered.load(_DIRECTORY / name)


@pytest.fixture(params=[*COMMITTED, *(pytest.param(name, marks=pytest.mark.slow) for name in VALUES)])
def made(request: pytest.FixtureRequest) -> Rendered:
    return _committed(request.param) if request.param in COMMITTED else rendered(request.param)


def _router_options(made: Rendered) -> Object:
    [application] = made.deployed.applications
    [router] = application.deployments
    assert router.name == "Router"
    options: Object = router.ray_actor_options.model_dump(exclude_unset=True)  # type: ignore[union-attr]
    return options


@pytest.mark.parametrize("name", COMMITTED)
@pytest.mark.slow
def test_valid_for_the_operator(name: str) -> None:
    assert crd.problems(_committed(name).service) == []


def _unknown_field(service: Rendered) -> None:
    service.cells.spec["minReplica"] = 1


def _wrong_type(service: Rendered) -> None:
    service.cells.spec["maxReplicas"] = "two"


def _missing_template(service: Rendered) -> None:
    del service.cells.spec["template"]


def _start_parameter_of_wrong_type(service: Rendered) -> None:
    service.head.spec["rayStartParams"]["num-cpus"] = 0


def _container_without_name(service: Rendered) -> None:
    del service.head.container["name"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "path"),
    [
        (_unknown_field, "workerGroupSpecs[1]"),
        (_wrong_type, "maxReplicas"),
        (_missing_template, "workerGroupSpecs[1]"),
        (_start_parameter_of_wrong_type, "num-cpus"),
        (_container_without_name, "containers[0]"),
    ],
)
def test_mistakes_are_found(spoil: Callable[[Rendered], None], path: str) -> None:
    spoilt = deepcopy(_committed("rayservice.yaml"))
    spoil(spoilt)
    [problem] = crd.problems(spoilt.service)
    assert path in problem


def test_the_serve_config_is_valid_for_serve_and_for_us(made: Rendered) -> None:
    [application] = made.deployed.applications
    assert (application.import_path, application.route_prefix) == ("cluster.app:build", "/")
    cell = made.config.cell
    assert "auto" not in (cell.placement, cell.device), "what pods are there when it is built must not decide"


def test_a_typo_in_our_settings_is_found() -> None:
    made = deepcopy(_committed("rayservice.yaml"))
    made.service["spec"]["serveConfigV2"] = made.service["spec"]["serveConfigV2"].replace("placement:", "placment:")
    with pytest.raises(ConfigError, match="did you mean placement"):
        _ = made.config


def test_our_code_builds_what_serve_is_sent(made: Rendered, monkeypatch: pytest.MonkeyPatch) -> None:
    """On nothing but the head: no pod of a worker need be there. Serve lets the chart's options take ours' place."""
    monkeypatch.setattr(app, "nodes_there", lambda: [{"CPU": 0.0}])
    [application] = made.serve["applications"]
    router = app.build(application["args"])._bound_deployment
    [cells] = [part for part in router.init_args if isinstance(part, Application)]
    deployments = {deployment.name: deployment for deployment in (router, cells._bound_deployment)}
    assert {told["name"] for told in application["deployments"]} <= deployments.keys()
    assert router.num_replicas == made.config.cluster.routers
    for deployment in deployments.values():
        assert deployment._deployment_config.max_constructor_retry_count == made.config.cluster.start_tries
        assert deployment._deployment_config.graceful_shutdown_timeout_s < made.cells.drain_s


def test_a_cells_pod_is_a_cell(made: Rendered) -> None:
    """All bundles of a cell fit one pod, and its GPUs are exactly one cell's."""
    limits = made.cells.limits
    wanted = bundles(cell_settings(made.config))
    assert sum(bundle["CPU"] for bundle in wanted) <= float(limits["cpu"])
    assert sum(bundle.get("GPU", 0) for bundle in wanted) == limits.get("nvidia.com/gpu", 0)
    assert made.cells.container["resources"]["requests"].get("nvidia.com/gpu", 0) == limits.get("nvidia.com/gpu", 0)


def test_there_is_a_pod_for_every_cell(made: Rendered) -> None:
    spec, cluster = made.cells.spec, made.config.cluster
    assert spec["replicas"] == spec["minReplicas"] == cluster.min_cells
    spare = spec["maxReplicas"] - cluster.max_cells
    # On CPUs a new cell shares the old one's pod.
    assert (spare > 0) is (cluster.surge and made.config.cell.device == "cuda")
    assert made.cluster["enableInTreeAutoscaling"] is True


def test_routers_have_pods_of_their_own_and_nothing_else_fits_there(made: Rendered) -> None:
    spec, options = made.routers.spec, _router_options(made)
    assert spec["replicas"] == spec["minReplicas"] == made.config.cluster.num_routers
    assert spec["maxReplicas"] == 2 * spec["minReplicas"], "a change starts new ones before the old ones go"
    assert made.config.cluster.routers >= 2
    assert spec["resources"] == {"CPU": "0", ROUTER: "1"}, "so a pod that comes back gets the router that waits"
    assert options == {"num_cpus": 0, "resources": {ROUTER: 1}}
    assert all(ROUTER not in group.spec.get("resources", {}) for group in (made.head, made.cells))
    # A cell asks for CPUs, of which such a pod has none.
    assert all(bundle["CPU"] > 0 for bundle in bundles(cell_settings(made.config)))


def test_routers_are_spread(made: Rendered) -> None:
    [spread] = made.routers.pod["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= made.routers.labels.items()


def test_ports_agree_everywhere(made: Rendered) -> None:
    ingress = made.config.ingress
    wanted = {"serve": ingress.http_port, "serve-grpc": ingress.grpc_port}
    told = made.serve["http_options"]
    assert {name: value for name, value in http_options(ingress).items() if value is not None} == told
    assert ingress.host == "0.0.0.0"
    assert made.routers.ports == wanted | {"metrics": 8080}
    assert made.head.ports.items() >= made.routers.ports.items()
    for port in made.service["spec"]["serveService"]["spec"]["ports"]:
        assert (port["port"], port["targetPort"]) == (wanted.pop(port["name"]), port["name"])
    assert not wanted


def test_the_files_of_settings_are_mounted(made: Rendered) -> None:
    """In routers' pods all of them, for each a directory, which a changed Secret replaces whole."""
    for name in ("keys_file", "tls_cert_file", "tls_key_file", "grpc_client_ca_file"):
        path = getattr(made.config.ingress, name)
        assert path is None or "secret" in made.routers.mounts[path.rpartition("/")[0]]


def test_only_routers_get_requests(made: Rendered) -> None:
    """The Service finds its ports by their names, and a cell's pod has none of these."""
    assert made.cells.ports == {"metrics": 8080}
    assert made.service["spec"]["excludeHeadPodFromServeSvc"] is True
    assert made.head.spec["rayStartParams"]["num-cpus"] == "0"


def test_a_pod_is_ready_when_a_cell_answers(made: Rendered) -> None:
    ingress = made.config.ingress
    scheme = "http" if ingress.tls_cert_file is None else "https"
    for group in (made.routers, made.cells):
        assert f" {scheme}://localhost:{ingress.http_port}/ready" in group.probe
    assert f"/dev/tcp/127.0.0.1/{ingress.grpc_port}'" in made.routers.probe


def test_every_process_has_what_a_local_service_has(made: Rendered) -> None:
    """`up` sets the same for its own Ray."""
    wanted = {name: value for name, value in _SETTINGS.items() if name.startswith(("RAY_SERVE_", "RAY_USAGE_"))}
    for group in made.groups:
        environment = group.environment
        assert environment.items() >= wanted.items()
        assert environment["RAY_USAGE_STATS_REPORT_URL"].startswith("http://127.0.0.1:")
        limit = int(environment["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"])
        assert largest_message(made.config.engine.max_sequence_length) <= limit


def test_streams_may_finish_before_a_pod_ends(made: Rendered) -> None:
    drain = made.config.cluster.drain_timeout_s
    for group in (made.routers, made.cells):
        assert drain + 2 * LAST_WORDS_S < group.drain_s < group.grace_s


def test_the_head_outlives_the_drain_of_the_others(made: Rendered) -> None:
    assert made.cells.drain_s < made.head.drain_s < made.head.grace_s
    assert max(made.cells.grace_s, made.routers.grace_s) <= made.head.drain_s
    assert made.service["spec"]["rayClusterDeletionDelaySeconds"] > made.config.cluster.drain_timeout_s


def test_a_cell_may_fail_to_start_and_take_its_time(made: Rendered) -> None:
    """118 GB come from a volume at 100 MB/s in 20 minutes."""
    config = made.config
    assert config.cluster.start_tries > 1
    wanted_s = 0 if config.model.checkpoint == "demo" else 118e9 / 100e6
    assert min(config.engine.start_timeout_s, config.engine.mend_timeout_s) > wanted_s


def test_the_checkpoint_is_on_a_mounted_volume(made: Rendered) -> None:
    checkpoint = made.config.model.checkpoint
    for group in (made.routers, made.cells):
        found = [volume for path, volume in group.mounts.items() if checkpoint.startswith(f"{path}/")]
        assert len(found) == (checkpoint != "demo")
        assert all("persistentVolumeClaim" in volume for volume in found)
    assert made.cells.mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_pods_are_restricted(made: Rendered) -> None:
    """Kubernetes' Pod Security Standard `restricted`, of everything that a pod of ours starts."""
    for group in made.groups:
        _assert_restricted(group)
    _assert_confined(made.cluster["autoscalerOptions"])


def _assert_restricted(group: Group) -> None:
    security = group.pod["securityContext"]
    assert security["runAsNonRoot"] is True and security["runAsUser"] == 1000
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in [group.container, *group.pod.get("initContainers", [])]:
        _assert_confined(container)
    allowed = {"name", "persistentVolumeClaim", "emptyDir", "ephemeral", "csi", "image", "secret"}
    assert all(volume.keys() <= allowed for volume in group.pod.get("volumes", []))
    assert not {"hostNetwork", "hostPID", "hostIPC"} & group.pod.keys()


def _assert_confined(container: Object) -> None:
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_kuberays_own_labels_stay(made: Rendered) -> None:
    """Its Service of the head selects by these."""
    for group in made.groups:
        assert not {"app.kubernetes.io/name", "app.kubernetes.io/created-by"} & group.labels.keys()


def test_budgets_select_pods_and_leave_room(made: Rendered) -> None:
    budgets = {budget["metadata"]["name"]: budget["spec"] for budget in made.of_kind("PodDisruptionBudget")}
    assert budgets.keys() == {"twotower-router", "twotower-head"}
    assert budgets["twotower-router"]["minAvailable"] == made.config.cluster.routers - 1
    for group in (made.routers, made.head):
        assert budgets[f"twotower-{group.component}"]["selector"]["matchLabels"] == group.labels


def test_policies_select_pods_and_open_their_ports(made: Rendered) -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in made.of_kind("NetworkPolicy")}
    everybody = policies["twotower"]["podSelector"]["matchLabels"].items()
    assert all(everybody <= group.labels.items() for group in made.groups)
    assert policies["twotower-router"]["podSelector"]["matchLabels"] == made.routers.labels
    assert policies["twotower-head"]["podSelector"]["matchLabels"] == made.head.labels


_PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
_OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}


def test_whom_policies_let_in(made: Rendered) -> None:
    """Ray's exporter shows all metrics to whoever reaches it, so nobody but Prometheus and the service's pods may."""
    policies = [policy["spec"] for policy in made.of_kind("NetworkPolicy")]
    ingress, metrics = made.config.ingress, {group.ports["metrics"] for group in made.groups}
    assert metrics == {8080}
    for stranger, more in (({}, set()), (_PROMETHEUS, metrics), (_OPERATOR, set())):
        dashboard = {made.head.ports["dashboard"]} if stranger is _OPERATOR else set()
        assert _reached(policies, stranger, made.routers) == {ingress.http_port, ingress.grpc_port} | more
        assert _reached(policies, stranger, made.cells) == more
        assert _reached(policies, stranger, made.head) == dashboard | more
    assert _reached(policies, None, made.cells) == set() == _reached(policies, None, made.head), "no pod"
    for one in made.groups:
        assert all(_reached(policies, one.labels, other) == {_ANY} for other in made.groups)


def test_an_open_exporter_would_be_seen() -> None:
    """Without peers a rule is for everybody."""
    made = rendered("cpu-demo", "--set-json", "networkPolicy.monitoring=[]")
    policies = [policy["spec"] for policy in made.of_kind("NetworkPolicy")]
    assert _reached(policies, None, made.cells) == {8080}


_ANY = 0


def _reached(policies: list[Object], labels: Mapping[str, str] | None, group: Group) -> set[int]:
    """The ports of the group's pods that a pod with these labels reaches, in any namespace; None: what is no pod. A pod
    that no policy selects would be open."""
    chosen = [policy for policy in policies if policy["podSelector"]["matchLabels"].items() <= group.labels.items()]
    assert any("Ingress" in policy["policyTypes"] for policy in chosen)
    reached: set[int] = set()
    for rule in (rule for policy in chosen for rule in policy["ingress"]):
        if "from" not in rule or any(_is_peer(peer, labels) for peer in rule["from"]):
            reached |= {port["port"] for port in rule["ports"]} if "ports" in rule else {_ANY}
    return {_ANY} if _ANY in reached else reached


def _is_peer(peer: Object, labels: Mapping[str, str] | None) -> bool:
    assert peer.keys() <= {"namespaceSelector", "podSelector"} and peer.get("namespaceSelector", {}) == {}
    if labels is None:
        return False
    return bool(peer.get("podSelector", {}).get("matchLabels", {}).items() <= labels.items())


def test_there_are_manifests() -> None:
    assert set(COMMITTED) == set(chart.RENDERED)
