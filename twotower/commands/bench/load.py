"""How requests arrive. Plain data without the client, because flags are also read where the client is not installed."""

from dataclasses import dataclass

# Each request is kept, with the time of each of its blocks, until the report is written.
MAX_REQUESTS, MAX_REQUESTS_IN_ALL = 100_000, 1_000_000
MAX_SECONDS, MAX_CLIENTS, MAX_RATE = 86_400.0, 4_096, 10_000.0


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive: in a closed loop of `clients`, or at random times (Poisson) with `rate` a second,
    independent of earlier requests. The load ends after `requests`; after `seconds` or MAX_REQUESTS it sends no more.
    """

    clients: int | None
    rate: float | None
    requests: int | None
    seconds: float | None

    @property
    def name(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        return f"{self.clients} client{'' if self.clients == 1 else 's'}"
