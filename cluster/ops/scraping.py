"""Where Prometheus finds the metrics: Ray's exporter, one of each node, which runs with and without a dashboard."""

from cluster.ops.local_ray import failures_told


def targets() -> list[str]:
    """`host:port` of each living node of the Ray that this process has joined. Raises Unavailable."""
    import ray

    with failures_told("Ray"):
        nodes = [node for node in ray.nodes() if node["Alive"] and node["MetricsExportPort"] > 0]
    return [f"{_host(node['NodeManagerAddress'])}:{node['MetricsExportPort']}" for node in nodes]


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
