"""Instances of the task families and their train/test split. Knows nothing about tokens or models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Literal

from twotower.demo.families import FAMILIES, SHARES

Split = Literal["train", "test"]
_TEST_EVERY = 10


@dataclass(frozen=True)
class Instance:
    """One question with its only right answer."""

    family: str
    prompt: str
    answer: str

    def is_answered_by(self, text: str) -> bool:
        """Whether `text`, what a model wrote after the prompt, is right (outer blanks do not count)."""
        return text.strip() == self.answer

    @property
    def split(self) -> Split:
        """The side of the split this instance is on: a function of its prompt alone."""
        digest = hashlib.blake2b(self.prompt.encode(), digest_size=8).digest()
        return "test" if int.from_bytes(digest, "big") % _TEST_EVERY == 0 else "train"


def stream(split: Split, seed: int | str, family: str | None = None) -> Iterator[Instance]:
    """Endless instances of one side of the split, of one family or of all, each as often as its share says.

    Raises:
        KeyError: no such family.
    """
    families = FAMILIES if family is None else {family: FAMILIES[family]}
    rng = Random(f"{split}/{seed}/{family}")
    names = list(families)
    shares = [SHARES.get(name, 1) for name in names]
    while True:
        (name,) = rng.choices(names, shares)
        instance = Instance(name, *families[name](rng))
        if instance.split == split:
            yield instance


def held_out(family: str, count: int, seed: int = 0) -> list[Instance]:
    """`count` different test instances of `family`."""
    seen: dict[str, Instance] = {}
    for instance in islice(stream("test", seed, family), 200 * count):
        seen.setdefault(instance.prompt, instance)
        if len(seen) == count:
            break
    return list(seen.values())
