"""The service as clients see it: HTTP and gRPC, and what both say of errors and labels."""
