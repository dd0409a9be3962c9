"""TwoTower Serve's library: the two towers, how they decode, and the engines that run them.

The library knows nothing of Ray, HTTP or gRPC; `actors/` and `cluster/` build a service from it.
"""

__version__ = "0.2.0"
