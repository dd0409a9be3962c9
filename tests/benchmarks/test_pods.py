"""What `benchmarks.pods` makes of what its clients say. The cases themselves take minutes each and are run by hand."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from ray.serve.config import HTTPOptions

from benchmarks import pods
from benchmarks.pods_parts import gateway
from benchmarks.pods_parts.cases import CASES, Case
from benchmarks.pods_parts.clients import Request, Stuck
from benchmarks.pods_parts.manifest import Manifest
from benchmarks.pods_parts.report import Result, first_tokens, pauses, render
from benchmarks.pods_parts.secrets import Secrets
from benchmarks.pods_parts.site import PATH
from benchmarks.pods_parts.weights import write_other_weights
from benchmarks.reference.workload import DEMO
from cluster.certificates import Files, read
from cluster.config import ServiceConfig
from cluster.http_options import TLS, check_same
from cluster.runs.keys import hash_of, read_keys
from tests.deploy.chart import require
from twotower.model.checkpoint import Checkpoint

STREAM = "grpc long ar stream"


def _result(*requests: Request) -> Result:
    return Result("head", "The head is killed.", 10.0, list(requests), resumed=2, waited=[("it is back", 4.0)])


def _right(**given: object) -> Request:
    return Request("10.0.0.1", STREAM, **{"sent": 1.0, "outcome": "right", "ended": 20.0} | given)  # type: ignore[arg-type]


def test_the_table_says_what_failed_and_how_long_streams_stood_still() -> None:
    told = _right(errors=[(10.1, "10.0.0.1", "failed: UNAVAILABLE: gone")])
    paused = _right(events=[2.0, 2.5, 12.5, 13.0])
    late = _right(sent=11.0, events=[14.0])
    text = render([_result(told, paused, late)], {"date": "today"})
    assert "| head | yes | 3 | 0 | 0 | 0 | 1 | 2 | 0 | 10.0 (0.5) | 3.0 (1.0) |" in text
    assert "- 4.0 s until it is back" in text and text.endswith("Nothing.\n")


@pytest.mark.parametrize(
    ("request_", "row"),
    [
        (_right(outcome="failed: UNAVAILABLE: gone"), "| **no** | 1 | 1 | 0 |"),
        (_right(outcome="changed tokens: got (1,), wanted (2,)"), "| **no** | 1 | 0 | 1 |"),
        (_right(outcome="", ended=math.inf), "| **no** | 1 | 1 | 0 |"),
        (_right(outcome="right, by the other weights"), "| yes | 1 | 0 | 0 |"),
    ],
)
def test_what_is_not_right_does_not_pass(request_: Request, row: str) -> None:
    result = _result(request_)
    text = render([result], {})
    assert row in text
    assert result.passed == text.endswith("Nothing.\n") == request_.is_good
    if request_.outcome:
        assert request_.is_good or f"1 × {request_.outcome}" in text


def test_a_gap_counts_where_it_ends() -> None:
    result = _result(_right(sent=0.0, events=[1.0, 9.0, 10.5]))
    assert pauses(result) == (1.5, 8.0)
    assert first_tokens(result) == (0.0, 1.0)
    assert pauses(_result()) == (0.0, 0.0) and not _result().passed, "a case without requests shows nothing"


def test_a_case_that_gets_stuck_is_told_of_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stuck(directory: Path, result: Result) -> None:
        result.requests.append(_right())
        raise Stuck("not so within 240 s: it is back")

    kept = tmp_path / "kept"
    kept.mkdir()
    result = pods._run(Case("head", "The head is killed.", stuck), kept)
    assert result.wrong == ["Stuck: not so within 240 s: it is back"] and not result.passed
    assert "not so within" in render([result], {}) and len(list(kept.iterdir())) == 1
    assert "| head | **no** | 1 | 0 |" in capsys.readouterr().out


def test_an_unknown_case_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pods.main(["--cases", "head,tail"])
    known = ", ".join(case.name for case in CASES)
    assert f"got tail, wanted some of {known}" in capsys.readouterr().err


def test_a_redis_is_told_to_the_head_and_patience_to_workers(tmp_path: Path) -> None:
    plain, safe = Manifest.for_two_small_hosts(tmp_path), Manifest.for_two_small_hosts(tmp_path, redis="10.0.0.9:6379")
    assert safe.head.environment.keys() - plain.head.environment.keys() == {
        "RAY_REDIS_ADDRESS",
        "RAY_external_storage_namespace",
    }
    assert safe.worker.environment.keys() - plain.worker.environment.keys() == {
        "RAY_gcs_rpc_server_reconnect_timeout_s"
    }
    assert safe.head.grace_s > safe.worker.grace_s, "without the head workers end at once"


def test_a_host_takes_as_many_routers_as_it_is_told(tmp_path: Path) -> None:
    """Where one is lost, a host has room for no other one beside its own, as a routers' pod of the chart."""
    one, many = (Manifest.for_two_small_hosts(tmp_path, routers_on_a_host=most) for most in (1, 8))
    assert "--resources='{\"twotower_router\": 1}'" in one.worker.command
    assert "--resources='{\"twotower_router\": 8}'" in many.worker.command
    assert "twotower_router" not in one.head.command


def test_the_service_of_the_bench_reads_the_secrets_of_the_run(tmp_path: Path) -> None:
    """By the settings of the manifest: nothing of keys and TLS is said a second time."""
    secrets = Secrets(tmp_path)
    config = json.loads(Manifest.for_two_small_hosts(tmp_path).serve_config({}))
    [application] = config["applications"]
    ingress = ServiceConfig.parse(application["args"]).ingress
    check_same(HTTPOptions(**config["http_options"]), ingress, TLS)
    files = Files.of(ingress)
    assert files is not None and files.client_ca is not None and ingress.keys_file is not None
    assert _fingerprint(read(files).chain) == secrets.shown
    assert [entry.sha256 for entry in read_keys(Path(ingress.keys_file))] == [hash_of(secrets.access().key)]
    assert secrets.access().key not in Path(ingress.keys_file).read_text()


def test_a_renewed_secret_is_exchanged_whole(tmp_path: Path) -> None:
    """As the kubelet does it: who has a file open reads on, and a certificate never lies beside another one's key."""
    secrets = Secrets(tmp_path)
    mounted = tmp_path / "twotower-tls"
    before, key = secrets.shown, (mounted / "tls.key").read_bytes()
    with (mounted / "tls.crt").open("rb") as open_still:
        secrets.renew()
        assert _fingerprint(open_still.read()) == before
    assert secrets.shown == _fingerprint((mounted / "tls.crt").read_bytes()) != before
    assert (mounted / "tls.key").read_bytes() != key and (mounted / "tls.key").resolve().parent == (
        mounted / "..data"
    ).resolve()


def _fingerprint(pem: bytes) -> str:
    return x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256()).hex()


@pytest.mark.parametrize(("old", "new", "said"), [("", "", " OK"), ("timeout: 0s", "timeuot: 0s", "timeuot")])
def test_envoy_takes_the_gateways_configuration(old: str, new: str, said: str, tmp_path: Path) -> None:
    """And names what is wrong in another one."""
    envoy = require(shutil.which("envoy", path=PATH), "envoy")
    gateway.write_hosts(tmp_path, ["10.0.0.1", "10.0.0.2"])
    Secrets(tmp_path / "secrets").write_gateways(tmp_path)
    config = tmp_path / "envoy.yaml"
    config.write_text(gateway.CONFIG.read_text().replace("/tmp/ray/", f"{tmp_path}/").replace(old, new))
    command = [envoy, "--mode", "validate", "--config-path", str(config), "--disable-hot-restart"]
    validated = subprocess.run(command, capture_output=True, text=True)
    assert (validated.returncode == 0) == (not old)
    assert said in validated.stdout + validated.stderr


def test_the_other_weights_are_another_checkpoint_with_the_demos_vocabulary(tmp_path: Path) -> None:
    demo, other = Checkpoint.open(DEMO), Checkpoint.open(write_other_weights(tmp_path / "other"))
    assert demo.fingerprint != other.fingerprint and demo.vocabulary == other.vocabulary
    assert demo.config == other.config and demo.files.keys() == other.files.keys()
