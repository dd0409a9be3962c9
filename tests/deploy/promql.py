"""Which series a query of PromQL asks for, and by which labels. It reads what our queries use, and is no parser."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.faces.error_codes import CODES
from cluster.watch import cell_metrics, router_metrics
from cluster.watch.metric import Kind, Metric, declared_in
from cluster.watch.words import SCORE
from twotower.core import FinishReason, Mode

PARTS = ("_bucket", "_count", "_sum")
# What Ray, and Prometheus on Kubernetes, add to ours.
_COMMON = {"model_name", "namespace", "NodeAddress", "WorkerId"}
_VALUES = {
    "mode": {*map(str, Mode), SCORE},
    "finished_reason": set(map(str, FinishReason)),
    "code": {code.grpc.name for code in CODES.values()} | {"CANCELLED"},
    "reason": {"cell_lost", "gap", "handed_over", "commit", "prompt"},
}
_STRING = r'"(?:[^"\\]|\\.)*"'
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
_SELECTOR = re.compile(rf"([a-zA-Z_:][\w:]*)\s*(?:\{{((?:{_STRING}|[^}}\"])*)\}})?(\s*\()?")
_MATCHER = re.compile(rf"(\w+)\s*(=~|!~|!=|=)\s*({_STRING})")
_OPERATORS = {"and", "or", "unless", "bool", "offset"}


@dataclass(frozen=True)
class Selector:
    """A series that is asked for, and which values of labels."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]  # label, operator, value


def selectors(query: str) -> list[Selector]:
    """All of a query, in order."""
    bare = re.sub(r"\[[^\]]*\]", "", _GROUPING.sub("", query))
    found = []
    for match in _SELECTOR.finditer(bare):
        name, matchers, is_function = match.groups()
        if not is_function and name not in _OPERATORS and not re.match(r"\d", bare[match.start() - 1 : match.start()]):
            told = tuple((label, how, value[1:-1]) for label, how, value in _MATCHER.findall(matchers or ""))
            found.append(Selector(name, told))
    return found


def groupings(query: str) -> list[set[str]]:
    """The labels of each `by`, `on` and the like."""
    return [{label.strip() for label in labels.split(",")} - {""} for labels in _GROUPING.findall(query)]


def grouped_by(query: str) -> set[str]:
    return set().union(*groupings(query))


def metrics() -> dict[str, Metric]:
    """Every declared metric by each name that Prometheus has for it."""
    declared = (*declared_in(vars(router_metrics)), *declared_in(vars(cell_metrics)))
    return {
        metric.shown_name + part: metric
        for metric in declared
        for part in (PARTS if metric.kind is Kind.HISTOGRAM else ("",))
    }


def problems(query: str) -> Iterator[str]:
    """What of a query is not declared: a name, a label, a label's value."""
    declared, labels = metrics(), {*_COMMON}
    if not selectors(query):
        yield f"no series is asked for in {query}"
    for selector in selectors(query):
        metric = declared.get(selector.name)
        if metric is None:
            yield f"{selector.name} is not declared"
            continue
        own = {*metric.labels, *(("le",) if selector.name.endswith("_bucket") else ())}
        labels |= own
        for label, how, value in selector.matchers:
            if label not in own | _COMMON:
                yield f"{selector.name} has no label {label}"
            elif label in _VALUES and not value.startswith("$"):
                values = value.split("|") if how in ("=~", "!~") else [value]
                yield from (f"{label} is never {one}" for one in values if one not in _VALUES[label])
    yield from (f"{label} is a label of none of these series" for label in sorted(grouped_by(query) - labels))
