"""Reading by several threads: what is in host memory meanwhile, what is told, and what one thread's failure ends."""

import logging
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import twotower.model.checkpoint as checkpoint_module
from tests.goldens import CPU, VENDORED, vendored
from tests.model.checkpoints import config_of, tensors_of, write_sharded
from twotower.errors import CheckpointError
from twotower.expert_formats import ExpertFormat
from twotower.model import reading
from twotower.model.checkpoint import Checkpoint, Reader
from twotower.model.loading import load_context_tower

MODEL = "tt_moe"


class Counted:
    """Stands in for a reader's `tensor`: counts what is alive, and holds each thread's first until all have one."""

    def __init__(self, threads: int, failing: str = "") -> None:
        self.most_alive, self._alive, self.read, self._failing = 0, 0, 0, failing
        self._counting, self._first = threading.Lock(), threading.Barrier(threads, timeout=30)
        self._threads: set[int] = set()
        self._whole = Reader.tensor

    def tensor(self, reader: Reader, name: str) -> Tensor:
        found = self._whole(reader, name)
        with self._counting:
            self.read += 1
            self._alive += 1
            self.most_alive = max(self.most_alive, self._alive)
            first = threading.get_ident() not in self._threads
            self._threads.add(threading.get_ident())
        weakref.finalize(found.untyped_storage(), self._gone)
        if first:
            self._first.wait()
        if self._failing and self._failing in name:
            raise CheckpointError(f"{name} cannot be read")
        return found

    def _gone(self) -> None:
        with self._counting:
            self._alive -= 1


@pytest.fixture
def sharded(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_sharded(tmp_path, tensors_of(MODEL), config_of(MODEL)))


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if every tower were large."""
    monkeypatch.setattr(reading, "_BIG_BYTES", 0)
    monkeypatch.setattr(reading, "_RUN_BYTES", 20_000)
    yield


def _counted(monkeypatch: pytest.MonkeyPatch, failing: str = "") -> Counted:
    counted = Counted(reading.READERS, failing)
    monkeypatch.setattr(checkpoint_module.Reader, "tensor", lambda reader, name: counted.tensor(reader, name))
    return counted


@pytest.mark.parametrize("form", [None, ExpertFormat(8)], ids=str)
def test_several_read_and_each_holds_one_tensor(
    form: ExpertFormat | None, sharded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(sharded.directory, form)
    wanted = load_context_tower(Checkpoint.open(VENDORED / MODEL, form), CPU, torch.float32).state_dict()
    counted = _counted(monkeypatch)
    tower = load_context_tower(checkpoint, CPU, torch.float32)
    assert counted.most_alive == reading.READERS
    assert counted.read == sum(name.startswith("context_") for name in checkpoint.files)
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_one_failure_ends_all(sharded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = _counted(monkeypatch, failing=".experts.")
    with pytest.raises(CheckpointError, match=r"experts.*cannot be read"):
        load_context_tower(sharded, CPU, torch.float32)
    assert counted.read < sum(name.startswith("context_") for name in sharded.files) / 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loading")]


def test_inference_tensors_are_filled_too(sharded: Checkpoint) -> None:
    with torch.inference_mode():
        tower = load_context_tower(sharded, CPU, torch.float32)
    assert torch.equal(tower.embeddings.weight, vendored(MODEL).context.embeddings.weight)


def test_how_long_it_takes_is_told(sharded: Checkpoint, caplog: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO, logger="twotower.model.reading"):
        load_context_tower(sharded, CPU, torch.float32, progress=True)
    [told] = [record.getMessage() for record in caplog.records if record.name == "twotower.model.reading"]
    assert told.startswith("context tower: 0.0") and "3 of 3 shards, by 4 readers; about " in told
    assert " s from disk at " in told and "the pace of a sample of" in told
    assert told in capsys.readouterr().err
