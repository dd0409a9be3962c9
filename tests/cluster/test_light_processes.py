"""Routers, cells and `up` hold no weights, so they are spared torch: 2 s of a core at each start, and 180 MB."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
AS_A_ROUTER = """
from cluster.config import ServiceConfig
from cluster.router import Router
from cluster.runs.served_model import load_served_model
model = load_served_model(ServiceConfig.parse({}))
assert model.tokenizer.decode(model.tokenizer.encode("words: 2009")) == "words: 2009"
"""
AS_A_CELL = """
from actors.cell import start_pair
from actors.hosts import ColocatedActor, ContextActor, DenoiserActor
from cluster.cell import Cell
"""
AS_UP = """
from cluster.app import build
from cluster.config import ServiceConfig
from cluster.ops.deployment import check
check(ServiceConfig.parse({}))
"""
IN_THE_END = """
import sys
assert "torch" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [AS_A_ROUTER, AS_A_CELL, AS_UP], ids=["a router", "a cell", "up"])
def test_no_torch(program: str) -> None:
    subprocess.run([sys.executable, "-c", program + IN_THE_END], cwd=CHECKOUT, check=True)
