"""Which cells Serve keeps: it takes a cell out of this set before it ends the cell.

A separate module, because Serve copies the class of its request router with its module's names.
"""

cells: frozenset[str] = frozenset()  # of this process's only handle to cells
