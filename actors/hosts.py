"""The classes of Ray's actor processes. Each hosts a tower and imports its code only in that process. So a cell, which
only names these classes, needs no torch.
"""

from typing import Any

from actors.settings import CellSettings


class Host:
    """`hosts`: a class of actors.towers with only asynchronous methods."""

    hosts: str

    def __init__(self, settings: CellSettings) -> None:
        from actors import towers

        self._tower = getattr(towers, self.hosts)(settings)

    async def call(self, method: str, *args: object) -> Any:
        """The result of the tower's method. Raises the method's errors."""
        return await getattr(self._tower, method)(*args)


class ContextActor(Host):
    hosts = "ContextProcess"


class DenoiserActor(Host):
    hosts = "DenoiserProcess"


class ColocatedActor(Host):
    hosts = "ColocatedProcess"
