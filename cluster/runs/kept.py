"""Which cells Serve keeps: it takes out one that is to go before it ends it.

A module of its own, since Serve copies the class of its request router, and the module's names with it.
"""

cells: frozenset[str] = frozenset()  # of this process's only handle to cells
