"""Lines between cells and routers over TLS, by the files that Ray takes."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.runs import line_tls
from cluster.runs.cell_lines import CellLines
from cluster.runs.messages import Beat
from cluster.runs.router_lines import RouterLines
from tests.certificates import Family, drawn, family
from twotower.errors import ConfigError, Unavailable

SOME, OTHER = family(), family(1)


def use(files: Family, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a node of Ray: one certificate for both ends."""
    for name, content in zip(line_tls.FILES, (files.chain, files.server.key, files.root.pem), strict=True):
        (directory / name).write_bytes(content)
        monkeypatch.setenv(name, str(directory / name))
    monkeypatch.setenv(line_tls.SWITCH, "1")


@asynccontextmanager
async def router() -> AsyncIterator[CellLines]:
    lines = CellLines()
    await lines.start("127.0.0.1")
    try:
        async with asyncio.timeout(10):
            yield lines
    finally:
        lines.stop()


@asynccontextmanager
async def cell() -> AsyncIterator[RouterLines]:
    lines = RouterLines(lambda: Beat("cell", "f", ("ar",), 0, 0, 1))
    try:
        yield lines
    finally:
        await lines.close()


async def test_a_line_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(SOME, tmp_path, monkeypatch)
    async with router() as lines, cell() as other:
        line = await other.to(lines.address)
        assert line.connection is not None
        assert line.connection._transport.get_extra_info("cipher") is not None
        while not lines.beats():
            await asyncio.sleep(0.001)


async def test_who_has_no_certificate_or_trusts_another_is_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it has the token."""
    use(SOME, tmp_path, monkeypatch)
    async with router() as lines:
        monkeypatch.setenv(line_tls.SWITCH, "0")
        async with cell() as plain:
            with pytest.raises(Unavailable):
                await plain.to(lines.address)
        (tmp_path / "other").mkdir()
        use(OTHER, tmp_path / "other", monkeypatch)
        async with cell() as stranger:
            with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
                await stranger.to(lines.address)
        async with cell() as unshown:
            unshown._tls = ssl.create_default_context(cadata=SOME.root.pem.decode())
            with pytest.raises(Unavailable):
                await unshown.to(lines.address)
        assert not lines.beats()


async def test_a_router_that_has_no_tls_hears_nothing_of_a_cell_that_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with router() as lines:
        use(SOME, tmp_path, monkeypatch)
        async with cell() as other:
            with pytest.raises(Unavailable):
                await other.to(lines.address)


async def test_the_address_has_to_be_in_the_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = drawn("server", SOME.middle, hosts=("127.9.9.9",))
    use(Family(SOME.root, SOME.middle, elsewhere, SOME.client), tmp_path, monkeypatch)
    async with router() as lines, cell() as other:
        with pytest.raises(Unavailable, match="IP address mismatch"):
            await other.to(lines.address)


def test_files_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert line_tls.listening({}) is None and line_tls.connecting({line_tls.SWITCH: "false"}) is None
    use(SOME, tmp_path, monkeypatch)
    assert line_tls.listening() is not None
    (tmp_path / line_tls.KEY).write_bytes(SOME.server.encrypted_key)
    with pytest.raises(ConfigError, match="RAY_TLS_SERVER_KEY: is encrypted"):
        line_tls.listening()
    (tmp_path / line_tls.KEY).write_bytes(OTHER.server.key)
    with pytest.raises(ConfigError, match=r"RAY_USE_TLS: the files of .* cannot be used: .*KEY_VALUES_MISMATCH"):
        line_tls.connecting()
    (tmp_path / line_tls.CA).unlink()
    (tmp_path / line_tls.KEY).write_bytes(SOME.server.key)
    with pytest.raises(ConfigError, match=r"cannot be used: .*No such file"):
        line_tls.connecting()
    monkeypatch.delenv(line_tls.CA)
    with pytest.raises(ConfigError, match="RAY_USE_TLS: got it without RAY_TLS_CA_CERT"):
        line_tls.listening()
