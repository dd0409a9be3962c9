"""The Helm chart, as Helm sees it: linted, rendered with everything switched on, and refusing what is wrong by name."""

import subprocess
from pathlib import Path

import pytest
import yaml

from scripts import chart
from tests.deploy.chart import VALUES, refusal, rendered, require_helm
from tests.deploy.kinds import OF_OTHERS, problems
from tests.deploy.rendered import Rendered

pytestmark = pytest.mark.slow

_ALL = """
redis: {address: "rediss://redis.example:6380", password: {secretName: redis, key: password}}
rayTokenSecret: ray-token
image: {digest: "sha256:%s", pullSecrets: [registry]}
environment: [{name: OTEL_EXPORTER_OTLP_ENDPOINT, value: "http://collector:4318"}]
routers: {secrets: [{secretName: twotower-tls, mountPath: /etc/twotower/tls}], nodeSelector: {pool: cpu}}
weights:
  volume: {emptyDir: {sizeLimit: 140Gi}}
  init: {image: "downloader:1", command: [fetch], envFrom: [{secretRef: {name: bucket}}]}
settings: {cluster: {min_cells: 3, max_cells: 4, drain_timeout_s: 1200}}
service: {annotations: {example: "yes"}}
routes: {http: true, grpc: true, parentRefs: [{name: gateway}], hostnames: [twotower.example]}
networkPolicy: {clients: [{podSelector: {matchLabels: {app: gateway}}}], egress: [{ports: [{port: 4318}]}]}
podMonitor: {enabled: true, labels: {release: prometheus}}
tls: {secretName: serving, grpcClientCa: {secretName: clients, key: ca.crt}}
""" % ("a" * 64)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    path = tmp_path_factory.mktemp("values") / "all.yaml"
    path.write_text(_ALL)
    return rendered("two-gpus", "--values", str(path))


@pytest.mark.parametrize("values", VALUES)
def test_helm_finds_nothing_wrong(values: str) -> None:
    command = [require_helm(), "lint", "--strict", str(chart.CHART), "--values", f"{chart.CHART}/values/{values}.yaml"]
    linted = subprocess.run(command, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize("values", VALUES)
def test_everything_is_valid_for_the_api_server(values: str) -> None:
    found = rendered(values).objects
    assert {thing["kind"] for thing in found} == {"RayService", "PodDisruptionBudget", "NetworkPolicy"}
    assert [problem for thing in found for problem in problems(thing)] == []


def test_all_options_together_are_valid(full: Rendered) -> None:
    ours = [thing for thing in full.objects if thing["kind"] not in OF_OTHERS]
    assert [problem for thing in ours for problem in problems(thing)] == []
    assert {thing["kind"] for thing in full.objects} == {
        *("RayService", "PodDisruptionBudget", "NetworkPolicy", "HTTPRoute", "GRPCRoute", "PodMonitor")
    }


def test_a_mistake_in_another_object_is_found() -> None:
    [budget, *_] = rendered("cpu-demo").of_kind("PodDisruptionBudget")
    [problem] = problems({**budget, "spec": {**budget["spec"], "minAvaliable": 1}})
    assert "minAvaliable" in problem


def test_the_checked_in_manifests_are_what_the_chart_makes() -> None:
    require_helm()
    assert chart.stale(chart.made_of_settings() | chart.made_by_helm()) == []


def test_where_the_weights_come_from(full: Rendered) -> None:
    for group in (full.routers, full.cells):
        [init] = group.pod["initContainers"]
        assert init["volumeMounts"] == [{"name": "checkpoint", "mountPath": "/checkpoints"}]
        assert init["securityContext"] == group.container["securityContext"]
        assert group.mounts["/checkpoints"]["emptyDir"] == {"sizeLimit": "140Gi"}
    assert "/checkpoints" not in full.head.mounts


def test_the_state_of_the_head_is_in_redis(full: Rendered) -> None:
    options = full.cluster["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == "rediss://redis.example:6380"
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "redis", "key": "password"}
    [policy] = [found for found in full.of_kind("NetworkPolicy") if found["metadata"]["name"] == "twotower-head"]
    assert {"protocol": "TCP", "port": 6380} in policy["spec"]["egress"][-1]["ports"]


def test_who_may_be_evicted(full: Rendered) -> None:
    """With Redis the head may; of three cells one may."""
    stay = {found["metadata"]["name"]: found["spec"]["minAvailable"] for found in full.of_kind("PodDisruptionBudget")}
    assert stay == {"twotower-router": 1, "twotower-cell": 2}


def test_times_follow_the_drain(full: Rendered) -> None:
    assert (full.cells.drain_s, full.cells.grace_s, full.head.drain_s, full.head.grace_s) == (1230, 1260, 1260, 1290)


def test_secrets_are_directories_of_routers(full: Rendered) -> None:
    assert full.routers.mounts["/etc/twotower/tls"]["secret"] == {"secretName": "twotower-tls"}
    assert "/etc/twotower/tls" not in full.cells.mounts
    assert full.cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}


def test_tls_is_in_every_place_that_has_to_know_it(full: Rendered) -> None:
    """Each pod has one of Serve's HTTP proxies, which has to find the files; routers alone ask for clients'."""
    ingress, http = full.config.ingress, full.deployed.http_options
    assert ingress.tls_cert_file == http.ssl_certfile == "/etc/twotower-tls/tls.crt"
    assert ingress.tls_key_file == http.ssl_keyfile == "/etc/twotower-tls/tls.key"
    assert ingress.grpc_client_ca_file == "/etc/twotower-client-ca/ca.crt"
    for group in full.groups:
        assert group.mounts["/etc/twotower-tls"]["secret"] == {"secretName": "serving"}
    wanted = {"secretName": "clients", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    assert full.routers.mounts["/etc/twotower-client-ca"]["secret"] == wanted
    assert all("/etc/twotower-client-ca" not in group.mounts for group in (full.head, full.cells))
    for group in (full.routers, full.cells):
        assert "wget --no-proxy --no-check-certificate -T 2 -q -O- https://localhost:8000/ready" in group.probe
    ports = full.service["spec"]["serveService"]["spec"]["ports"]
    assert [port["appProtocol"] for port in ports] == ["https", "https"]


def test_without_tls_nothing_is_mounted() -> None:
    made = rendered("cpu-demo")
    assert made.config.ingress.tls_cert_file is None and made.deployed.http_options.ssl_certfile is None
    assert made.head.mounts == made.routers.mounts == {} and "http://localhost:8000/ready" in made.routers.probe


def test_routes_reach_the_service(full: Rendered) -> None:
    [http], [grpc] = full.of_kind("HTTPRoute"), full.of_kind("GRPCRoute")
    ports = {port["name"]: port["port"] for port in full.service["spec"]["serveService"]["spec"]["ports"]}
    for route, port in ((http, ports["serve"]), (grpc, ports["serve-grpc"])):
        [rule] = route["spec"]["rules"]
        assert rule["backendRefs"] == [{"name": "twotower-serve-svc", "port": port}]
        assert (route["spec"]["parentRefs"], route["spec"]["hostnames"]) == (
            [{"name": "gateway"}],
            ["twotower.example"],
        )


def test_prometheus_reads_every_pod(full: Rendered) -> None:
    [monitor] = full.of_kind("PodMonitor")
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    for group in full.groups:
        assert monitor["spec"]["selector"]["matchLabels"].items() <= group.labels.items()
        assert group.ports[endpoint["port"]] == 8080


def test_more_variables_and_another_image_are_everywhere(full: Rendered) -> None:
    for group in full.groups:
        assert group.environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector:4318"
        assert group.container["image"] == f"twotower@sha256:{'a' * 64}"
        assert group.pod["imagePullSecrets"] == [{"name": "registry"}]


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("settings.cell.placment=split", "additional properties 'placment' not allowed"),
        ("settings.cell.placement=auto", "/settings/cell/placement"),
        ("settings.cell.max_sequences=0", "/settings/cell/max_sequences': minimum: got 0, want 1"),
        ("settings.cell.gpus_per_tower=0.5", "/settings/cell/gpus_per_tower"),
        ("settings.cluster.num_routers=1", "/settings/cluster/num_routers': minimum: got 1, want 2"),
        ("settings.cluster.min_cells=3", "settings.cluster.min_cells: got 3, which is more than max_cells (2)"),
        ("settings.cell.device=cpu", "settings.cluster.max_cells: got 2 with device cpu, wanted 1"),
        ("settings.ingress.host=127.0.0.1", "/settings/ingress/host"),
        ("settings.ingress.http_port=8265", "/settings/ingress/http_port"),
        ("settings.model.checkpoint=/elsewhere", "got /elsewhere, wanted a directory in weights.mountPath"),
        ("weights.claim=", "weights.claim: got none"),
        ("weights.volume.hostPath.path=/data", "/weights/volume"),
        ("cells.surgePods=0", "cells.surgePods: got 0 with settings.cluster.surge true"),
        ("cells.resources.limits.memory=lots", "/cells/resources/limits/memory"),
        ("image.digest=sha256:1", "/image/digest"),
        ("redis.address=nowhere", "/redis/address"),
        ("routes.http=true", "routes.parentRefs: got none"),
        ("settings.ingress.tls_cert_file=/a", "settings.ingress.tls_cert_file: got /a, wanted tls.secretName"),
        ("settings.ingress.grpc_client_ca_file=/a", "settings.ingress.grpc_client_ca_file: got /a, wanted tls."),
        ("tls.secretName=Big", "/tls/secretName"),
        ("tls.certificate=../x", "/tls/certificate"),
        ("tls.grpcClientCa.secretName=clients", "/tls/grpcClientCa"),
        ("replicas=3", "additional properties 'replicas' not allowed"),
    ],
)
def test_a_wrong_value_is_refused_by_name(option: str, named: str) -> None:
    assert named in refusal("two-gpus", "--set", option)


def test_clients_certificates_need_a_certificate_of_ours() -> None:
    given = ("--set", "tls.grpcClientCa.secretName=clients", "--set", "tls.grpcClientCa.key=ca.crt")
    assert "tls.grpcClientCa: got one without tls.secretName" in refusal("two-gpus", *given)


def test_a_name_that_kuberay_would_refuse_is_refused() -> None:
    assert "release name: got 2towers" in refusal("two-gpus", release="2towers")
    assert "48 characters" in refusal("two-gpus", release="t" * 48)


@pytest.mark.parametrize(("option", "file"), [("rules", "alerts.yaml"), ("dashboards", "*.json")])
def test_observability_is_what_lies_in_its_directory(option: str, file: str) -> None:
    """Included where it is there, refused where it is not."""
    files = [path for path in Path(chart.ROOT, "deploy", "observability").glob(f"**/{file}")]
    given = ("--set", f"observability.{option}=true")
    if not files:
        assert f"observability.{option}: got true" in refusal("two-gpus", *given)
    elif option == "rules":
        [rule] = rendered("two-gpus", *given).of_kind("PrometheusRule")
        assert rule["spec"] == yaml.safe_load(files[0].read_text(encoding="utf-8"))
    else:
        held = rendered("two-gpus", *given).of_kind("ConfigMap")
        assert {name: text for found in held for name, text in found["data"].items()} == {
            path.name: path.read_text(encoding="utf-8") for path in files
        }
