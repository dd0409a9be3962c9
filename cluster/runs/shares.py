"""Counts what each caller holds at a time, so that one caller alone cannot take all."""

from collections import Counter

from twotower.errors import Overloaded


class Shares:
    """`most` units, of which the last quarter is kept for callers that hold no more than a quarter of all.

    Without keys, all clients behind a gateway are one caller, and get three quarters together.
    """

    def __init__(self, most: int, what: str) -> None:
        self._most, self._what = most, what
        self._held: Counter[str] = Counter()  # only callers that hold any
        self.total = 0

    def take(self, caller: str, units: int = 1) -> None:
        """Raises Overloaded, and then takes nothing."""
        total, own = self.total + units, self._held[caller] + units
        if total > self._most:
            raise Overloaded(f"{self._what}: {total} at a time, wanted at most {self._most}")
        if 4 * total > 3 * self._most and 4 * own > self._most:
            quarter = self._most // 4
            raise Overloaded(f"{self._what}: {own} at a time of one caller, wanted at most {quarter} under this load")
        self.total, self._held[caller] = total, own

    def give_back(self, caller: str, units: int = 1) -> None:
        self.total -= units
        self._held[caller] -= units
        if not self._held[caller]:
            del self._held[caller]
