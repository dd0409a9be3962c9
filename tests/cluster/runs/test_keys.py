"""The file of keys: what it may say, how a key is looked up, and that a change is seen while a service runs."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import rereading
from cluster.runs.callers import Caller, KeyRefused, Limits
from cluster.runs.keys import KeyEntry, Keys, hash_of, new_key, read_keys
from twotower.errors import ConfigError

A, B = "tt-" + 43 * "a", "tt-" + 43 * "b"  # fixed: names of cases are made of them


def entry(name: str, key: str, **limits: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hash_of(key), **limits}


def written(path: Path, *entries: dict[str, Any]) -> Path:
    """As a Secret's update: another file under the same name."""
    other = path.with_suffix(".new")
    other.write_text(yaml.safe_dump({"keys": [*entries]}))
    other.replace(path)
    return path


def opened(path: Path, routers: int = 1) -> Keys:
    return Keys(path, routers)


def test_a_key_is_its_holders_and_limits_are_shared_by_routers(tmp_path: Path) -> None:
    limits = {"concurrent_requests": 5, "tokens_per_minute": 1000, "priority_from": 0}
    keys = opened(written(tmp_path / "keys", entry("a", A), entry("b", B, **limits)), routers=2)
    assert keys.caller(A, "10.0.0.1") == Caller("a", has_key=True)
    assert keys.caller(A, "").limits == Limits(whole=(None, None)) and keys.names == ("a", "b")
    assert keys.caller(B, "10.0.0.1").limits == Limits(3, 500, 0, whole=(5, 1000))
    assert len(drawn := {new_key() for _ in range(100)}) == 100
    assert all(key.startswith("tt-") and len(key) == len(A) for key in drawn)


@pytest.mark.parametrize(("key", "words"), [(None, "requires a key: "), ("", "not known"), (A[:-1], "not")])
def test_without_a_key_that_is_known_nobody_gets_in(key: str | None, words: str, tmp_path: Path) -> None:
    keys = opened(written(tmp_path / "keys", entry("a", A)))
    with pytest.raises(KeyRefused, match=words) as caught:
        keys.caller(key, "10.0.0.1")
    assert not key or key not in str(caught.value)
    with pytest.raises(KeyRefused):
        keys.caller(hash_of(A), "10.0.0.1")


def test_a_changed_file_is_seen_and_a_wrong_one_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "keys", entry("a", A))
    keys = opened(path)
    written(path, entry("b", B))
    assert keys.caller(A, "").name == "a", "a call does not read"
    keys.look()
    assert keys.caller(B, "").name == "b"
    with pytest.raises(KeyRefused):
        keys.caller(A, "")
    path.write_text("keys: []")
    for _ in range(2):
        keys.look()
        assert keys.caller(B, "").name == "b", "those of before stay"
    path.unlink()
    keys.look()
    assert keys.caller(B, "").name == "b"
    told = [record.message for record in caplog.records if "stay" in record.message]
    assert len(told) == 2 and "at least 1 item" in told[0] and "No such file" in told[1]
    written(path, entry("a", A))
    keys.look()
    assert keys.caller(A, "").name == "a"


def test_what_could_not_be_read_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a key that was taken away would stay for ever after one bad moment."""
    path = written(tmp_path / "keys", entry("a", A))
    keys = opened(path)
    written(path, entry("b", B))
    with monkeypatch.context() as broken:
        broken.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        keys.look()
    assert keys.caller(A, "").name == "a"
    keys.look()
    assert keys.caller(B, "").name == "b"


async def test_it_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rereading, "_LOOK_S", 0.01)
    path = written(tmp_path / "keys", entry("a", A))
    keys = opened(path)
    watching = asyncio.create_task(keys.watch())
    written(path, entry("b", B))
    async with asyncio.timeout(20):
        while keys.names != ("b",):
            await asyncio.sleep(0.01)
    watching.cancel()


@pytest.mark.parametrize("name", ["123", "null", "on", "1.5", "1_0", "0x1f", "-", "2024-13-45", "2024-12-31", "a.b"])
def test_an_entry_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    """Names that YAML would take for something else."""
    made = KeyEntry(name=name, sha256="1" * 64, tokens_per_minute=5)
    (tmp_path / "keys").write_text("keys:\n" + made.written() + KeyEntry(name="other", sha256="2" * 64).written())
    assert read_keys(tmp_path / "keys")[0] == made


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no YAML"),
        ("- 1", "valid dictionary"),
        ("keys:\n- {name: a b, sha256: " + hash_of(A) + "}", "keys.0.name"),
        ("keys:\n- {name: a, sha256: tt-secret}", "keys.0.sha256"),
        ("keys:\n- {name: a}", "keys.0.sha256: Field required"),
        (f"keys:\n- {{name: a, sha256: {hash_of(A)}, tokens_per_minute: 0}}", "tokens_per_minute"),
        (f"keys:\n- {{name: a, sha256: {hash_of(A)}, token_per_minute: 5}}", "keys.0: an unknown name"),
        (f"keys:\n- {{name: a, sha256: {hash_of(A)}}}\n- {{name: b, sha256: {hash_of(A)}}}", "same sha256 twice"),
        (f"keys:\n- {{name: a, sha256: {hash_of(A)}}}\n- {{name: a, sha256: {hash_of(B)}}}", "same name twice"),
        ("[" * 1000, "is no YAML|nested too deeply"),
        ("#" * (2**18 + 1), "more than 262144 bytes"),
        (f"keys:\n- {{name: a, {hash_of(A)}: 1}}", "keys.0: an unknown name"),
        (f"keys:\n- name: '{hash_of(A)}", "is no YAML in line"),
        ("keys: !!timestamp foo", "is no YAML of keys: AttributeError"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_without_its_hashes(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_keys(path)
    told = str(caught.value)
    assert told.startswith(f"ingress.keys_file: {path}: ")
    assert hash_of(A) not in told and hash_of(B) not in told and "tt-secret" not in told


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_keys(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_keys(tmp_path)


def test_a_secret_of_kubernetes_is_a_link_to_a_directory_that_is_exchanged(tmp_path: Path) -> None:
    for name, key in (("one", A), ("two", B)):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "keys.yaml", entry(name, key))
        os.utime(tmp_path / name / "keys.yaml", (0, 0))
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    keys = opened(tmp_path / "keys.yaml")
    assert keys.caller(A, "").name == "one"
    (tmp_path / "..data_tmp").symlink_to("two")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    keys.look()
    assert keys.caller(B, "").name == "two"
