"""The actors that Ray makes processes of. Each hosts a tower, whose code it imports where it runs: a cell, which names
these classes only, is spared torch."""

from typing import Any

from actors.settings import CellSettings


class Host:
    """`hosts`: a class of actors.towers, all of whose methods are asynchronous."""

    hosts: str

    def __init__(self, settings: CellSettings) -> None:
        from actors import towers

        self._tower = getattr(towers, self.hosts)(settings)

    async def call(self, method: str, *args: object) -> Any:
        """What the tower's method answers. Raises what it raises."""
        return await getattr(self._tower, method)(*args)


class ContextActor(Host):
    hosts = "ContextProcess"


class DenoiserActor(Host):
    hosts = "DenoiserProcess"


class ColocatedActor(Host):
    hosts = "ColocatedProcess"
