"""Where a router's two faces listen, and the variable that tells a client's process what it shows and believes."""

HTTP_PORT, GRPC_PORT = 8000, 50051
ACCESS = "ACCESS"
