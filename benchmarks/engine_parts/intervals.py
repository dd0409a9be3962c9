"""Arithmetic on sets of time. A set is a sorted list of (start, end) that do not touch; `union` makes one."""

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """All of them as one set."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def intersection(one: list[Interval], other: list[Interval]) -> list[Interval]:
    """Time that is in both sets."""
    both: list[Interval] = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            both.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return both


def difference(one: list[Interval], other: list[Interval]) -> list[Interval]:
    """Time of the first set that is not in the second."""
    if not one:
        return []
    first, last = one[0][0], one[-1][1]
    edges = [first, *(edge for interval in other for edge in interval), last]
    gaps = [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
    return intersection(one, gaps)


def total(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
