"""A running service: configuration, routers and cells on Ray Serve, HTTP and gRPC, the command line."""
