"""twotower.v1 over gRPC, on each router's own server."""
