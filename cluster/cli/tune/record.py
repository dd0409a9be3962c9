"""The passes of a sweep, written to disk as they end if the sweep has an output."""

import json
from dataclasses import asdict

from cluster.cli.tune.sweep import Answered, Pass, Way
from twotower.commands.journal import Journal
from twotower.core import Mode


class Record:
    """Passes by their way. Without a journal they are only kept in memory."""

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        found = [] if journal is None else [_pass(line) for _, line in journal.entries]
        self.passes: dict[Way, Pass] = {one.way: one for one in found}

    @property
    def resumed(self) -> bool:
        """Measured in several runs."""
        return self._journal is not None and self._journal.resumed

    def add(self, one: Pass) -> None:
        self.passes[one.way] = one
        if self._journal is not None:
            self._journal.add("pass", json.dumps({**asdict(one), "way": one.way._asdict()}))

    def close(self, told: bool) -> None:
        """`told`: everything has been written elsewhere, so no run will continue from here."""
        if self._journal is None:
            return
        if told:
            self._journal.remove()
        else:
            self._journal.close()


def _pass(line: str) -> Pass:
    plain = json.loads(line)
    answers = (Answered(**{**each, "token_ids": tuple(each["token_ids"])}) for each in plain["answers"])
    return Pass(Way(Mode(plain["way"]["mode"]), plain["way"]["threshold"]), tuple(answers), plain["seconds"])
