"""The command, and a checkpoint with a tokenizer."""

from collections.abc import Callable

import pytest

from tests.commands.running import Run
from tests.model.checkpoints import config_of, tensors_of, write
from tests.text.tokenizers_for_tests import metaspace, save


@pytest.fixture(scope="session")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with a tokenizer."""
    directory = write(tmp_path_factory.mktemp("text"), tensors_of("tt_moe"), config_of("tt_moe"))
    save(metaspace(), directory)
    return str(directory)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    return lambda *arguments: Run(capsys, *arguments)
