"""What a router tells of its files: those of keys and of certificates."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from cluster.certificates import Credentials
from cluster.rereading import Rereading
from cluster.runs.admission import Admission
from cluster.runs.keys import Keys, hash_of
from cluster.runs.turns import Turns
from cluster.watch import router_metrics as metrics
from cluster.watch.files import NO_FILES, Files
from cluster.watch.router import RouterWatch
from cluster.watch.shown import ShownOverHttp
from tests.cluster.watch.noted import Noted
from tests.cluster.watch.test_router_watch import Lines
from twotower.core import Mode

NOW = datetime(2026, 11, 30, tzinfo=UTC)
RIGHT = f"keys:\n  - name: me\n    sha256: {hash_of('tt-1')}\n"


def credentials(days: float) -> Credentials:
    return Credentials(b"chain", b"key", None, NOW + timedelta(days=days))


def rewritten(path: Path, text: str) -> None:
    """As a Secret is: another file takes its place."""
    new = path.with_name("new")
    new.write_text(text)
    new.replace(path)


async def gauges(files: Files) -> dict[Any, float]:
    noted = Noted()
    watch = RouterWatch("demo", (Mode.AR,), noted, now=lambda: NOW)
    watch._read_files(files)
    watch.start(Admission(8, 2), Turns(), cast(Any, Lines()), cast(Any, lambda: True))
    await watch.stop()
    told = (metrics.FILE_FAULT, metrics.CERTIFICATE_LEFT)
    return {(metric.name, *labels): value for (metric, labels), value in noted.gauges.items() if metric in told}


async def test_certificates_of_both_faces_each_with_its_end(tmp_path: Path) -> None:
    path, days = tmp_path / "cert.pem", [10.0]
    path.write_text("a")
    rereading = Rereading("certificates", [path], lambda: credentials(days[0]))
    shown = ShownOverHttp("127.0.0.1", 1)
    files = Files(NO_FILES.door, rereading, shown)
    assert ("certificate_left_seconds", "http") not in await gauges(files), "nobody has seen it"
    shown.until = NOW + timedelta(days=10)
    days[0] = 90.0
    rewritten(path, "b")
    rereading.look()
    assert await gauges(files) == {
        ("file_not_taken", "certificates"): 0,
        ("certificate_left_seconds", "http"): 10 * 86400,
        ("certificate_left_seconds", "grpc"): 90 * 86400,
    }
    assert await gauges(NO_FILES) == {}


@pytest.mark.parametrize("wrong", ["keys: [", "keys: []", None])
async def test_a_file_of_keys_that_cannot_be_taken(tmp_path: Path, wrong: str | None) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(RIGHT)
    keys = Keys(path)
    assert await gauges(Files(keys)) == {("file_not_taken", "keys"): 0}
    if wrong is None:
        path.unlink()
    else:
        rewritten(path, wrong)
    keys.look()
    assert await gauges(Files(keys)) == {("file_not_taken", "keys"): 1} and keys.caller("tt-1", "").name == "me"
    assert Files(keys).told() == (keys.fault,) and str(path) in keys.fault and hash_of("tt-1") not in keys.fault
    rewritten(path, RIGHT.replace("name: me", "name: you"))
    keys.look()
    assert await gauges(Files(keys)) == {("file_not_taken", "keys"): 0} and keys.caller("tt-1", "").name == "you"
