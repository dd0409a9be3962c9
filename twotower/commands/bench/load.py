"""How requests come. Plain data, without the client: flags are read where it is not installed."""

from dataclasses import dataclass

MAX_REQUESTS, MAX_SECONDS, MAX_CLIENTS, MAX_RATE = 1_000_000, 86_400.0, 4_096, 10_000.0


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come: in a closed loop of `clients`, or at random (Poisson) with `rate` a second, whatever becomes
    of the ones before. It ends after `requests`, or takes no more after `seconds`."""

    clients: int | None
    rate: float | None
    requests: int | None
    seconds: float | None

    @property
    def name(self) -> str:
        if self.rate is not None:
            return f"{self.rate:g} requests/s"
        return f"{self.clients} client{'' if self.clients == 1 else 's'}"
