"""Connections inside the cluster go directly, whatever proxies the environment names. Imports nothing heavy."""

import os


def bypass_proxies() -> None:
    """gRPC of this process and of its children connects directly, whatever `http_proxy` says: Serve's calls go to
    nodes, and a list of exceptions may lack a node's address. An empty `grpc_proxy` takes precedence over the other
    variables.
    """
    os.environ.update(grpc_proxy="")
