"""Dataclasses that processes of two versions send each other, pickled, while a service is upgraded."""

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def across_versions(kind: type[Kind]) -> type[Kind]:
    """A decorator of a dataclass with slots. An object pickled by an older version gets the defaults of missing fields;
    further fields of a newer version are dropped. So a new field comes last, and has a default.

    Python's own unpickling leaves missing fields unset.
    """

    def restore(self: Any, state: Sequence[object]) -> None:
        known = fields(kind)  # type: ignore[arg-type]
        for one, value in zip(known, state, strict=False):
            object.__setattr__(self, one.name, value)
        for one in known[len(state) :]:
            made = one.default if one.default_factory is MISSING else one.default_factory()
            object.__setattr__(self, one.name, made)

    kind.__setstate__ = restore  # type: ignore[attr-defined]
    return kind
