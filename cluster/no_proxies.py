"""Connections inside the cluster go directly, whatever proxies the environment names. Imports nothing heavy."""

import os


def bypass_proxies() -> None:
    """gRPC of this process, and of those it starts, connects directly, whatever `http_proxy` says: Serve's calls go to
    nodes, and every list of exceptions may lack a node's address. An empty `grpc_proxy` goes before the others."""
    os.environ.update(grpc_proxy="")
