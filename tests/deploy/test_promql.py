"""What is not declared is found in a query."""

import pytest

from tests.deploy.promql import Selector, problems, selectors


def test_series_are_found() -> None:
    query = """
      histogram_quantile(0.95, sum by (le, mode) (rate(ray_a_bucket{mode!="score", x=~"a|}"}[5m])))
        > 1e3 and on (mode) group_left () max_over_time(ray_b[1h:1m] offset 5m) unless count(ray_c) == 0
    """
    assert selectors(query) == [
        Selector("ray_a_bucket", (("mode", "!=", "score"), ("x", "=~", "a|}"))),
        Selector("ray_b", ()),
        Selector("ray_c", ()),
    ]


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("sum(rate(ray_twotower_tokens_total[5m]))", "ray_twotower_tokens_total is not declared"),
        ("rate(ray_serve_num_requests[5m])", "ray_serve_num_requests is not declared"),
        ("rate(ray_twotower_steps_per_block[5m])", "ray_twotower_steps_per_block is not declared"),
        ('ray_twotower_router_ready{mode="ar"}', "ray_twotower_router_ready has no label mode"),
        ('ray_twotower_cells_alive{mode="dffusion"}', "mode is never dffusion"),
        ('ray_twotower_calls_refused_total{code=~"INTERNAL|FULL"}', "code is never FULL"),
        ("sum by (tower) (ray_twotower_router_ready)", "tower is a label of none of these series"),
        ("sum by (le) (ray_twotower_router_ready)", "le is a label of none of these series"),
        ("vector(1)", "no series is asked for in vector(1)"),
    ],
)
def test_problems_are_found(query: str, problem: str) -> None:
    assert list(problems(query)) == [problem]


def test_a_good_query_has_no_problem() -> None:
    assert list(problems("sum by (model_name, le) (rate(ray_twotower_steps_per_block_bucket[1m]))")) == []
