"""What `auto` stands for, by the cluster's nodes."""

import pytest

from cluster.app import router_deployment
from cluster.config import load_config
from cluster.placing import Nodes, choose, missing

Node = dict[str, float]


def cpu(*cores: float) -> list[Node]:
    return [{"CPU": number} for number in cores]


def gpu(*gpus: float) -> list[Node]:
    return [{"CPU": 8.0, "GPU": number} for number in gpus]


@pytest.mark.parametrize(
    ("settings", "nodes", "placement", "device", "why"),
    [
        ("", cpu(1), "colocated", "cpu", "auto is colocated: a node has 1 core, split wants more than 2"),
        ("", cpu(2), "colocated", "cpu", "auto is colocated: a node has 2 cores, split wants more than 2"),
        ("", cpu(3), "split", "cpu", "auto is split: a node has 3 cores, one for each tower and more"),
        ("", cpu(2, 2, 2), "colocated", "cpu", "a node has 2 cores"),  # a cell lies on one node
        ("", cpu(0, 8), "split", "cpu", "a node has 8 cores"),  # a head without cores beside a large worker
        ("", [], "colocated", "cpu", "a node has 0 cores"),
        ("", gpu(1), "colocated", "cuda", "auto is colocated: a node has 1 GPU for both towers"),
        ("", gpu(1, 1), "colocated", "cuda", "a node has 1 GPU for both towers"),
        ("", gpu(2), "split", "cuda", "auto is split: a node has 2 GPUs, 1 for each tower"),
        ("", gpu(0, 8), "split", "cuda", "auto is split: a node has 8 GPUs"),
        ("device=cpu", gpu(8), "split", "cpu", "a node has 8 cores"),
        ("device=cuda", gpu(1), "colocated", "cuda", "a node has 1 GPU"),
        ("device=cuda", cpu(2), "split", "cuda", "auto is split: no node has a GPU yet"),
        ("device=cuda", [], "split", "cuda", "auto is split: no node has a GPU yet"),
        ("gpus_per_tower=2", gpu(2), "colocated", "cuda", "a node has 2 GPU"),
        ("gpus_per_tower=2", gpu(4), "split", "cuda", "a node has 4 GPUs, 2 for each tower"),
        ("gpus_per_tower=0.5", gpu(2), "colocated", "cuda", "cell.gpus_per_tower is 0.5"),
        ("gpus_per_tower=0", gpu(2), "split", "cpu", "a node has 8 cores"),
        ("gpus_per_tower=0 device=cuda", gpu(2), "colocated", "cuda", "cell.gpus_per_tower is 0"),
        ("denoisers_per_context=3", cpu(2), "split", "cpu", "cell.denoisers_per_context is 3"),
        ("denoisers_per_context=3", gpu(2), "split", "cpu", "a cell of 4 tower processes wants 4 GPUs, a node has 2"),
        ("denoisers_per_context=3", gpu(4), "split", "cuda", "cell.denoisers_per_context is 3"),
        ("ssm_wire_dtype=bfloat16", cpu(1), "split", "cpu", "cell.ssm_wire_dtype is bfloat16"),
        ("placement=split", cpu(2), "split", "cpu", "split, as configured; with 2 cores colocated is faster"),
        ("placement=split", cpu(3), "split", "cpu", "split, as configured; device"),
        ("placement=split denoisers_per_context=2", cpu(2), "split", "cpu", "split, as configured; device"),
        ("placement=split", gpu(1, 1), "split", "cpu", "a cell of 2 tower processes wants 2 GPUs, a node has 1"),
        ("placement=colocated", gpu(2), "colocated", "cuda", "colocated, as configured"),
        ("placement=ar_only", cpu(8), "ar_only", "cpu", "ar_only, as configured"),
    ],
)
def test_auto(settings: str, nodes: Nodes, placement: str, device: str, why: str) -> None:
    choice = choose(load_config(None, [f"cell.{setting}" for setting in settings.split()]), nodes)
    assert (choice.config.cell.placement, choice.config.cell.device) == (placement, device)
    assert choice.why.startswith("placement ") and why in choice.why and "\n" not in choice.why
    again = choose(choice.config, gpu(4))  # a node that comes later changes nothing
    assert again.config == choice.config


@pytest.mark.parametrize(
    ("asked", "nodes", "routers", "why"),
    [
        ("", [], 1, "1 router: no node has cores"),
        ("", cpu(8), 1, "1 router: one node has cores"),
        ("", cpu(0, 8), 1, "1 router: one node has cores"),  # a head without cores takes none
        ("", cpu(2, 2), 2, "2 routers: 2 nodes have cores"),
        ("", gpu(1, 1, 1, 1), 2, "2 routers: 4 nodes have cores"),
        ("1", cpu(2, 2), 1, "1 router, as configured"),
        ("3", cpu(2), 3, "3 routers, as configured"),
    ],
)
def test_a_router_survives_the_loss_of_a_node(asked: str, nodes: Nodes, routers: int, why: str) -> None:
    choice = choose(load_config(None, [f"cluster.num_routers={asked}"] if asked else []), nodes)
    assert choice.config.cluster.routers == routers and choice.why.endswith(f"; {why}")
    assert router_deployment(choice.config).num_replicas == routers
    assert choose(choice.config, cpu(1, 1, 1)).config == choice.config, "a node that comes later changes nothing"


CELL = [{"CPU": 0.1}, {"CPU": 0.1, "GPU": 1.0}, {"CPU": 0.1, "GPU": 1.0}]


@pytest.mark.parametrize(
    ("cells", "nodes", "words"),
    [
        (1, [{"CPU": 2.0}], "1 cell wants 2 GPUs where Ray has 0"),
        (3, [{"CPU": 2.0, "GPU": 4.0}], "3 cells want 6 GPUs where Ray has 4"),
        (1, [{"GPU": 2.0}], "1 cell wants 0.3 CPUs where Ray has 0"),
        (1, [], "1 cell wants 2 GPUs where Ray has 0 and 0.3 CPUs where Ray has 0"),
        (1, gpu(1, 1), "1 cell wants a node with 2 GPUs and 0.3 CPUs each, Ray has room for 0"),
        (2, gpu(3, 1), "2 cells want a node with 2 GPUs and 0.3 CPUs each, Ray has room for 1"),
        (2, [{"CPU": 0.6, "GPU": 4.0}], None),
        (2, gpu(2, 2), None),
    ],
)
def test_what_does_not_fit_is_said(cells: int, nodes: Nodes, words: str | None) -> None:
    assert missing(CELL, cells, nodes) == words
