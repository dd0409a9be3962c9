"""How many compute threads a tower is given, and that a tower process sets them."""

import asyncio
from dataclasses import replace

import pytest
import torch

from actors.settings import CellSettings
from actors.towers import ColocatedProcess
from tests.actors.test_cell import DEMO
from tests.goldens import MODELS, golden
from twotower.engine.settings import EngineSettings
from twotower.model.threads import threads_for


def test_only_a_wide_model_is_worth_more_than_one() -> None:
    config = golden(MODELS[0]).context.config
    assert [threads_for(replace(config, hidden_size=256), cores) for cores in (1, 2, 64)] == [1, 1, 1]
    assert [threads_for(replace(config, hidden_size=2688), cores) for cores in (0, 1, 2, 64)] == [1, 1, 2, 64]


@pytest.mark.slow
def test_a_tower_process_of_the_demo_computes_on_one() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    settings = CellSettings(str(DEMO), device="cpu", placement="colocated", engine=EngineSettings(capture="off"))
    actor = ColocatedProcess(settings)
    try:
        home = asyncio.run(actor.load())
        assert (home["threads"], torch.get_num_threads()) == ("1", 1)
    finally:
        actor.runner.stop()
        torch.set_num_threads(before)
