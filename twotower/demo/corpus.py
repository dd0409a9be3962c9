"""Instances of the task families and their train/test split. Knows nothing about tokens or models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from twotower.demo.families import FAMILIES, SHARES
from twotower.errors import CheckpointError, ConfigError

Split = Literal["train", "test"]
CORPUS_FILE = "corpus.json"  # beside a checkpoint's weights: the families it was trained on
_TEST_EVERY = 10
_PATIENCE = 3000


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


def families_of(directory: Path) -> tuple[str, ...]:
    """The families a checkpoint was trained on: nothing else may be expected of it. All where it does not say.

    Raises CheckpointError.
    """
    path = directory / CORPUS_FILE
    if not path.exists():
        return tuple(FAMILIES)
    try:
        known = {str(family) for family in json.loads(path.read_text(encoding="utf-8"))["families"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a list of families: {error!r}") from error
    unknown = sorted(known - FAMILIES.keys())
    if unknown or not known:
        raise CheckpointError(f"{path}: got {unknown or 'none'}, wanted some of {', '.join(FAMILIES)}")
    return tuple(family for family in FAMILIES if family in known)


def save_families(directory: Path) -> None:
    """Say that the checkpoint was trained on all of the corpus."""
    (directory / CORPUS_FILE).write_text(json.dumps({"families": list(FAMILIES)}) + "\n", encoding="utf-8")


def stream(
    split: Split, seed: int | str, family: str | None = None, known: Collection[str] = FAMILIES
) -> Iterator[Instance]:
    """Endless instances of one side of the split, of one family or of all `known` ones as often as their shares say.

    Raises:
        KeyError: no such family.
    """
    families = {name: FAMILIES[name] for name in (known if family is None else [family])}
    rng = Random(f"{split}/{seed}/{family}")
    names = list(families)
    shares = [SHARES.get(name, 1) for name in names]
    while True:
        (name,) = rng.choices(names, shares)
        instance = Instance(name, *families[name](rng))
        if instance.split == split:
            yield instance


def held_out(family: str, count: int, after: int = 0) -> list[Instance]:
    """`count` different test instances of `family`, always the same, without the first `after` of them.

    Raises ConfigError where the family has fewer.
    """
    wanted = after + count
    seen: dict[str, Instance] = {}
    known = 0  # drawn since the last new one
    for instance in stream("test", 0, family):
        known = known + 1 if instance.prompt in seen else 0
        seen.setdefault(instance.prompt, instance)
        if len(seen) == wanted:
            return list(seen.values())[after:]
        if known > _PATIENCE:
            break
    raise ConfigError(f"{family}: wanted {wanted} test instances, found only {len(seen)}")
